"""The teacher of a distillation: a second model whose distribution of the next token the trained model learns.

Its states are computed beside the trained model's, or with `distillation.top_k` its most likely tokens are computed
before the first step and kept, see `teacher_cache`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from plmtune.config.sections import DistillationConfig
from plmtune.data.batches import IGNORE, Batch, Batches, make_batch
from plmtune.errors import UserError
from plmtune.io.atomic import check_room
from plmtune.losses.cross_entropy import capped
from plmtune.losses.distillation import DistillationLoss, TeacherStates, TeacherTopK
from plmtune.models import adapters
from plmtune.models.assemble import meta_model
from plmtune.models.checkpoint_files import ADAPTER_CONFIG, read_json
from plmtune.models.hf_config import read_formats
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, install
from plmtune.quantization.schemes import EMBEDDING, HEAD, KEEP
from plmtune.registry import Component, describe_components, load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.training import distributed
from plmtune.training.init_from import check_finite, init_checkpoint_directory
from plmtune.training.monitor import RunMonitor
from plmtune.training.runtime import Runtime
from plmtune.training.teacher_cache import TeacherCache, most_likely, row_digest
from plmtune.units import show_bytes

TERMS = ("cross_entropy", "divergence", "hidden_difference")  # the metrics that `Teacher.take_terms` returns
_VERSION = 1  # of the cache's files
_CHUNK_ROWS = 256  # tokens whose logits are held at once


@dataclass
class Teacher:
    """The teacher of a run, whose weights do not train.

    Attributes:
        model: on the meta device until its weights are loaded; they are loaded for good only without `top_k`.
        num_rows: rows that the vocabulary projections of both models share.
        settings: the config's section.
        distillation: the loss.
        kept: where the run's tokenizer was compressed from the teacher's, the teacher's id of each of its tokens.
    """

    directory: Path
    model: Decoder
    num_rows: int
    settings: DistillationConfig
    distillation: DistillationLoss
    kept: Tensor | None = None
    digest: str = ""  # of weights and config: of those that a resumed run had, until `prepare` checks them
    _hidden: dict[tuple[bool, int], Tensor] = field(default_factory=dict)  # (of the teacher, pair): the last states
    _differences: list[Tensor] = field(default_factory=list)

    def prepare(self, student: Decoder, data: Batches, step: int, runtime: Runtime, monitor: RunMonitor) -> bool:
        """Load the weights, or with `top_k` compute what the cache lacks of the rows of `data` from `step` on.

        Every rank must call it. Returns False if a signal stopped it; what was computed by then is kept.
        """
        digest = distributed.broadcast_from_rank0(self._compute_digest)
        if self.digest not in ("", digest):
            raise UserError(
                f"distillation.teacher={self.settings.teacher}: it no longer holds the weights and the config that "
                "this run began with. Put them back, or start a new run."
            )
        self.digest = digest
        if self.settings.top_k is None:
            self.model = self._loaded(runtime)
            for pair in enumerate(zip(self.settings.layers, self.settings.teacher_layers, strict=True)):
                self._record(student, *pair)
            return True
        cache = TeacherCache(Path(self.settings.cache) / self._key(runtime), self.settings.top_k, self.num_rows)
        for line in cache.refresh():
            monitor.message(f"{line} It is computed again.")
        missing: dict[str, tuple[str, int]] = {}
        for name, index in data.distinct_rows(step)[runtime.rank :: runtime.world_size]:
            row = data.rows[name].row(index)
            if (digest := row_digest(row)) not in cache and (row.targets != IGNORE).any():
                missing[digest] = name, index
        done = self._compute(missing, cache, data, runtime, monitor)
        if damaged := cache.refresh():
            raise UserError(f"{damaged[0]} Is the disk sound?")
        data.attach = cache.read
        return done

    def _compute(
        self,
        missing: dict[str, tuple[str, int]],
        cache: TeacherCache,
        data: Batches,
        runtime: Runtime,
        monitor: RunMonitor,
    ) -> bool:
        """Add this rank's rows to the cache; False if a signal stopped it."""
        counts = [int(text) for text in distributed.gather_texts(str(len(missing)))]
        if not (total := sum(counts)):
            monitor.message(f"teacher: its {cache.k} most likely tokens are read from {cache.directory}")
            return True
        size = total * data.seq_len * cache.record_bytes
        monitor.message(
            f"teacher: the {cache.k} most likely tokens of {total:,} rows are computed; they take at most "
            f"{show_bytes(size)} in {cache.directory} ({cache.record_bytes} bytes a token)"
        )
        distributed.broadcast_from_rank0(
            lambda: check_room(cache.directory, size, " Give a smaller distillation.top_k.")
        )
        model = self._loaded(runtime)
        mine, batch_size = list(missing.items()), data.micro_batch_size
        stopped = False
        # Every rank makes as many forwards, since a forward may be collective.
        for first in range(0, max(counts), batch_size):
            if stopped := monitor.should_stop():
                break
            chosen = mine[first : first + batch_size]
            rows = [data.rows[name].row(index) for _, (name, index) in chosen] or [data.filler()]
            tops = self._most_likely(model, make_batch(rows).to(runtime.device), runtime)
            for (digest, _), row, top in zip(chosen, rows, tops, strict=False):
                assert len(top.ids) == int((row.targets != IGNORE).sum())
                cache.add(digest, top)
            monitor.working(f"teacher: {min(first + batch_size, counts[0]):,} of {counts[0]:,} rows")
        cache.flush()
        distributed.barrier()
        return not stopped

    def _record(self, student: Decoder, pair: int, layers: tuple[int, int]) -> None:
        """Keep the outputs of two layers, whenever they run."""
        for of_teacher, layer in ((False, student.layers[layers[0]]), (True, self.model.layers[layers[1]])):

            def keep(
                _module: nn.Module, _given: Any, output: Tensor, key: tuple[bool, int] = (of_teacher, pair)
            ) -> None:
                self._hidden[key] = output

            layer.register_forward_hook(keep)

    def loss(self, batch: Batch, states: Tensor, targets: Tensor, model: Decoder) -> Tensor:
        """Return the summed loss of a micro-batch that `model` just computed the hidden states [n, d] of.

        Args:
            states, targets: of the places that count.
        """
        given = self._states(batch)
        loss = self.distillation(states, model.head_weight, targets, teacher=given, **model.loss_settings)
        for pair in range(len(self.settings.layers)):
            ours, theirs = (batch.counted(self._hidden.pop((which, pair)))[0].float() for which in (False, True))
            difference = (ours - theirs).square().mean(dim=1).sum() / len(self.settings.layers)
            self._differences.append(difference.detach())
            loss = loss + self.settings.layers_weight * difference
        return loss

    def state_dict(self) -> dict[str, str]:
        """What a checkpoint keeps, so that a resumed run has the same teacher."""
        return {"teacher": self.digest}

    def take_terms(self) -> tuple[Tensor, ...]:
        """Return the sums of the terms that TERMS names, over all losses since the last call; the third with layers."""
        differences = [torch.stack(self._differences).sum()] if self._differences else []
        self._differences.clear()
        return (*self.distillation.take_terms(), *differences)

    @torch.no_grad()
    def _states(self, batch: Batch) -> TeacherStates | TeacherTopK:
        if batch.top_ids is not None:
            assert batch.top_log_probs is not None and batch.top_log_rest is not None
            return TeacherTopK(batch.top_ids, batch.top_log_probs, batch.top_log_rest, self.num_rows)
        return self._states_of(self.model, batch)

    def _states_of(self, model: Decoder, batch: Batch) -> TeacherStates:
        tokens, kept = batch.tokens, self.kept
        if kept is not None:
            kept = kept.to(tokens.device)
            tokens = kept[tokens]
        hidden = model(tokens, mask=batch.mask, input_pos=batch.input_pos, hidden=True)
        weight = model.head_weight if kept is None else model.head_weight[kept]
        return TeacherStates(batch.counted(hidden)[0], weight, **model.loss_settings)

    @torch.no_grad()
    def _most_likely(self, model: Decoder, batch: Batch, runtime: Runtime) -> list[TeacherTopK]:
        """The most likely tokens of each row's places that count."""
        k = self.settings.top_k or 1
        with runtime.autocast():
            states = self._states_of(model, batch)
        weight = states.weight[: self.num_rows].to(states.hidden.dtype)
        chunks = [
            most_likely(capped(hidden @ weight.T, states.soft_cap)[0], k) for hidden in states.hidden.split(_CHUNK_ROWS)
        ]
        counts = (batch.targets != IGNORE).sum(dim=1).tolist()
        whole = (torch.cat([vars(chunk)[name] for chunk in chunks]) for name in ("ids", "log_probs", "log_rest"))
        return [TeacherTopK(*parts) for parts in zip(*(tensor.split(counts) for tensor in whole), strict=True)]

    def _loaded(self, runtime: Runtime) -> Decoder:
        """The model with its weights, in the dtype of the arithmetic, sharded as the trained model is."""
        model = adapters.load_model(self.directory, runtime.device, runtime.compute_dtype).eval().requires_grad_(False)
        check_finite(model, f"distillation.teacher={self.settings.teacher}")
        if self.settings.quantization:
            from plmtune.quantization.quantize import quantize  # torchao takes a second to import

            quantize(model, quantized_formats(model, self.settings))
        if runtime.strategy in ("fsdp", "hsdp"):
            distributed.wrap(model, runtime.processes, runtime.compute_dtype)
        return model

    def _compute_digest(self) -> str:
        """The hash of all that decides what the model computes."""
        parts = [adapters.weights_digest(self.directory), self.model.config]
        if adapters.holds_adapters(self.directory):
            parts.append(read_json(self.directory, ADAPTER_CONFIG))
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def _key(self, runtime: Runtime) -> str:
        """The hash of what the numbers depend on, besides the row: the weights, the tokens kept, and the arithmetic."""
        arithmetic = f"{runtime.device.type} {runtime.compute_dtype}"
        kept = None if self.kept is None else self.kept.tolist()
        parts = [_VERSION, self.digest, kept, self.settings.top_k, self.num_rows, arithmetic, torch.__version__]
        parts += [self.settings.quantization] if self.settings.quantization else []
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def find_teacher(
    settings: DistillationConfig,
    chosen_loss: Component,
    loss: Any,
    tokenizer: Tokenizer | None,
    student: Decoder | None,
    seq_len: int,
) -> Teacher | None:
    """Find the teacher that a config names, and check that it fits the loss, the tokenizer, the model and the rows.

    Args:
        loss: what `chosen_loss` builds.
        tokenizer, student: None where they are not known yet.
    """
    losses: dict[str, Any] = {each: load("loss", each) for each in describe_components()["loss"]}
    distils = [each for each, made in losses.items() if getattr(made, "needs_teacher", False)]
    own, name = chosen_loss.name, settings.teacher
    if name is None and own in distils:
        raise UserError(f"key loss: {own} learns from a teacher. Give it: distillation.teacher=DIR")
    if name is None and (
        unused := next((key for key in ("top_k", "layers", "quantization") if getattr(settings, key)), None)
    ):
        raise UserError(f"key distillation.{unused}: there is no teacher. Give it: distillation.teacher=DIR")
    if name is None:
        return None
    if own not in distils:
        one_of = ", ".join(f"loss={each}" for each in distils)
        raise UserError(f"key distillation.teacher: {own} has no teacher. Choose one of {one_of}.")
    if settings.top_k is not None and not losses[own].takes_top_k:
        one_of = ", ".join(f"loss={each}" for each in distils if losses[each].takes_top_k)
        raise UserError(
            f"key distillation.top_k: {own} needs the teacher's whole distribution. Choose {one_of}, or leave "
            "distillation.top_k out."
        )
    directory = init_checkpoint_directory(name, weights=False)
    kept = None
    theirs = None if tokenizer is None else adapters.load_model_tokenizer(directory)
    if tokenizer is not None and theirs is not None and tokenizer.fingerprint != theirs.fingerprint:
        kept = next((torch.tensor(one.ids) for one in tokenizer.kept if one.original == theirs.fingerprint), None)
        if kept is None:
            raise UserError(
                f"distillation.teacher={name}: its tokenizer ({theirs.num_tokens:,} tokens) differs from this run's "
                f"({tokenizer.num_tokens:,}), so their tokens cannot be compared. Train with the teacher's "
                f"(tokenizer=file tokenizer.path={directory}), or with one that was "
                "compressed from it (plmtune tokenizer compress)."
            )
    config = adapters.read_model_config(directory)
    model = meta_model(config, str(directory))
    if theirs is not None and theirs.num_tokens > model.vocab_size:
        raise UserError(
            f"distillation.teacher={name}: it has {model.vocab_size:,} rows for the {theirs.num_tokens:,} tokens of "
            "its tokenizer. Take both from one model."
        )
    if settings.top_k is not None:
        _check_cache(Path(settings.cache))
    if seq_len > model.max_seq_len:
        raise UserError(
            f"distillation.teacher={name}: it reads {model.max_seq_len} tokens at once, and seq_len is {seq_len}. "
            f"Give seq_len={model.max_seq_len} or less."
        )
    if not adapters.holds_adapters(directory):
        install(model, read_formats(directory)[0])  # so that its size is estimated as it is stored
    if settings.quantization:
        install(model, quantized_formats(model, settings))
    num_rows = config["vocab_size"] if kept is None else len(kept)
    num_rows = num_rows if student is None else min(num_rows, student.vocab_size)
    if settings.top_k is not None and settings.top_k > num_rows:
        raise UserError(f"key distillation.top_k: {settings.top_k} exceeds the vocabulary ({num_rows}).")
    if student is not None and settings.layers:
        _check_layers(settings, student, model)
    return Teacher(directory, model, num_rows, settings, loss, kept)


def _check_cache(place: Path) -> None:
    """Refuse a cache that cannot be a folder, before anything is computed."""
    there = next((path for path in (place, *place.parents) if path.exists() or path.is_symlink()), place)
    if there.exists() and not there.is_dir():
        raise UserError(f"key distillation.cache: {there} is a file, and the cache is a folder. Name another place.")


def quantized_formats(model: Decoder, settings: DistillationConfig) -> dict[str, Format]:
    """How a teacher's matrices are stored: all but the vocabulary projection, which a loss writes out at once."""
    assert settings.quantization is not None
    head = EMBEDDING if model.tied else HEAD
    try:
        formats: dict[str, Format] = load("quantization", settings.quantization)(model, rules={head: KEEP})
    except ValueError as error:
        reason = str(error).partition(":")[0]
        raise UserError(
            f"distillation.teacher={settings.teacher}: {reason}. Leave distillation.quantization out."
        ) from error
    return formats


def _check_layers(settings: DistillationConfig, student: Decoder, teacher: Decoder) -> None:
    for key, model in (("layers", student), ("teacher_layers", teacher)):
        if (last := max(getattr(settings, key))) >= (count := len(model.layers)):
            raise UserError(f"key distillation.{key}: there is no layer {last}; the last of {count} is {count - 1}.")
    if student.embed_dim != teacher.embed_dim:
        raise UserError(
            f"key distillation.layers: the model's hidden states have {student.embed_dim} numbers, and the teacher's "
            f"{teacher.embed_dim}. Only equal widths can be compared."
        )
