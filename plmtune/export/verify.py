"""Verify an export: compare it with its checkpoint in the program that will serve it.

Checked are errors of the export itself. Its tensors must equal the checkpoint's up to the rounding of their types. The
runtime must compute what our model computes with those tensors. Type, names, settings, token ids and prompts must be
the checkpoint's. The cost of the type is reported without a verdict.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from plmtune.errors import UserError
from plmtune.export import probe_texts
from plmtune.export.arithmetic import with_rounded_inputs
from plmtune.export.contents import Contents, bits_of, differing, differing_parts, read_contents, settings_of
from plmtune.export.diagnosis import as_exported, divergence, find_cause, log_probs, reported_only
from plmtune.export.report import Check, Report
from plmtune.export.runtimes import InferenceRuntime, RuntimeName, choose_runtime, open_runtime
from plmtune.export.stored import summarize, suspect_tensors, wrong_type
from plmtune.export.verify_cache import compare_cache, compare_flash
from plmtune.export.verify_text import compare_ids, compare_prompts
from plmtune.models.adapters import load_model, load_model_tokenizer
from plmtune.models.checkpoint_files import checkpoint_directory
from plmtune.modules.attributes import with_attributes
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Quantized, is_quantized
from plmtune.ranges import AT_LEAST_1, check

__all__ = ["Check", "Report", "verify"]

# One token is 0.4% of them.
POSITIONS = 256
# Tokens that are read at once.
_WINDOW = 257
# Of a text's tokens, half of it where the model takes no more.
_LEAST = 32
_PROMPT, _WRITTEN = 16, 24
# The likeliest tokens of each position that a slow runtime is asked for.
_TOP_K = 1024
# A right program's divergence, as a multiple of the one that rounded inputs cause in our model; 1.2 at most in 57
# right files.
_OF_ROUNDING = 4.0
# Log-probabilities are fp32 numbers, which some runtimes write as text.
_LEAST_KL = 1e-9
# What an FFN that is stored in another form may change of a log-probability in F32.
_MOST_OFF = 1e-4
# A token that the runtime writes may be less likely in our model by as many times what rounding moves logarithms.
_TIE, _LEAST_TIE = 8.0, 1e-3
# Of the tokens that the runtime writes by itself, the share that our model, by more than its rounding, would not.
_WRITTEN_OTHERWISE = 0.05
# From here on what the type costs is warned of: nats, share of tokens, relative change.
_MUCH_KL, _MUCH_OTHER, _MUCH_PERPLEXITY = 0.1, 0.15, 0.1
_OVERFLOW = (
    "the runtime's numbers overflow: F16, in which it multiplies matrices of F16 and scales the blocks of many other "
    "types, ends at 65,504; take a type without it, f32 or bf16"
)
# transformers norms a DeepSeek's latent with it, whatever config.json says.
_LATENT_EPS = 1e-6


def verify(
    export: str | Path,
    against: str | Path,
    *,
    kind: str | None = None,
    text: str | None = None,
    positions: int = POSITIONS,
    threads: int | None = None,
    prefer: RuntimeName | None = None,
    base: Path | None = None,
) -> Report:
    """Read an export, run it in the program that serves it, and compare both with the checkpoint.

    Args:
        export: a .gguf or .pte file, or a directory in Hugging Face's form, quantized or not.
        against: a checkpoint, a model directory or a run: what the export was made from.
        kind: the type that it was made as; None: what its name and the file itself say.
        text: to predict; None: a page of prose, code and several languages.
        positions: tokens whose log-probabilities are compared, where the text has as many.
        threads: of the runtime; None: its own choice.
        prefer: the runtime, where several serve such a file.
        base: of a checkpoint that is adapters; None: what it names.

    Raises:
        UserError: if something cannot be read, or a package is missing. What is read and differs is a failed check of
            the report, and so is a file that the runtime does not open.
        ValueError: if positions is below 1.
    """
    check(AT_LEAST_1, positions=positions)
    export, source = Path(export), checkpoint_directory(against)
    name = choose_runtime(export, prefer)
    model = load_model(source, "cpu", torch.float32, base=base).eval()
    tokenizer = load_model_tokenizer(source, base)
    contents = read_contents(export, model)
    report = Report(str(export), str(against), name, contents.declared or contents.kind, 0)
    _compare_contents(report, model, contents, export.name, kind)
    most = min(model.max_seq_len, _WINDOW)
    try:
        opened = open_runtime(export, threads=threads, context=most, prefer=name, exact=True)
    except UserError as error:
        report.add("opened by the runtime: failures", 1, 0, None, str(error) if report.passed else None)
        return report
    numbers = None
    with opened as runtime:
        report.runtime = runtime.name
        ids = tokenizer.with_bos(tokenizer.encode(text if text is not None else probe_texts.PAGE))
        windows = _windows(ids, min(most, runtime.context), positions)
        report.positions = sum(last for _, last in windows)
        if runtime.vocab_size == model.vocab_size:
            numbers = _compare_numbers(report, runtime, model, windows, contents)
            compare_cache(report, runtime, model, contents, windows[0][0])
        elif report.passed:
            said = f"the runtime has {runtime.vocab_size:,} rows of the vocabulary, the checkpoint {model.vocab_size:,}"
            report.add("rows of the vocabulary: that differ", 1, 0, None, said)
        compare_ids(report, runtime, tokenizer, contents, vocabulary_differs=runtime.vocab_size != model.vocab_size)
        compare_prompts(report, runtime, tokenizer, contents)
    if numbers is not None:
        compare_flash(report, export, contents, windows[0], *numbers, threads=threads, prefer=name)
    return report


def _windows(ids: Sequence[int], most: int, positions: int) -> list[tuple[list[int], int]]:
    """Pieces of a text and how many of the last tokens of each are compared: as many in all as are asked for, or as
    the text has."""
    least = _LEAST if most >= _LEAST else _LEAST // 2
    if most < least:
        raise UserError(f"{most} tokens are all that it reads at once; fewer than {least} are too few to compare.")
    if len(ids) < least:
        raise UserError(f"a text of {len(ids)} tokens is too short to compare. Give a text of a page or more.")
    pieces = [list(ids[at : at + most]) for at in range(0, len(ids), most - 1)]
    whole = [piece for piece in pieces if len(piece) == most] or pieces[:1]
    count = min(len(whole), -(-positions // (most - 1)))
    last = min(-(-positions // count), len(whole[0]) - 1)
    return [(piece, last) for piece in whole[:count]]


def _compare_contents(report: Report, model: Decoder, contents: Contents, name: str, kind: str | None) -> None:
    """Compare what the export holds, without running it."""
    said = wrong_type(contents, name, kind, model)
    report.add("type: that differs", int(said is not None), 0, contents.declared or contents.kind, said)
    lacking = [*contents.missing, *contents.unknown]
    parts = []
    if contents.missing:
        head = ", so the embedding is taken for the head" if contents.missing[0].startswith(("output.", "lm_")) else ""
        parts.append(f"the export lacks {contents.missing[0]}{_more(contents.missing)}{head}")
    if contents.unknown:
        parts.append(f"the export holds {contents.unknown[0]}{_more(contents.unknown)}, which the checkpoint has not")
    report.add("names of tensors: that differ", len(lacking), 0, None, "; ".join(parts))
    wrong = differing(contents.settings, settings_of(model))
    others = [] if wrong else differing_parts(contents.computation, model)
    numbers = [f"{key} is {held:g} in the export, {wanted:g} here" for key, (held, wanted) in wrong.items()]
    report.add("settings: that differ", len(wrong) + len(others), 0, None, "; ".join([*numbers, *others[:4]]))
    rows = model.vocab_size if contents.rows is None else contents.rows
    said = f"the export has {rows:,} rows of the vocabulary, the checkpoint {model.vocab_size:,}"
    report.add("rows of the vocabulary: that differ", int(rows != model.vocab_size), 0, None, said)
    if contents.tensors:
        suspects = suspect_tensors(model, contents)
        if rows != model.vocab_size:  # reported already
            suspects = {name: what for name, what in suspects.items() if name.startswith("layers.")}
        remark = f"of {len(contents.tensors)}, beyond rounding"
        report.add("tensors: that differ", len(suspects), 0, remark, summarize(suspects))


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _compare_numbers(
    report: Report,
    runtime: InferenceRuntime,
    model: Decoder,
    windows: Sequence[tuple[list[int], int]],
    contents: Contents,
) -> tuple[Tensor, float] | None:
    """Lay what the runtime says beside what our model says: with the export's numbers, a check; without, its cost.

    Returns: what our model says with the export's numbers, of the first window, and the limit of the KL; None if the
        runtime's numbers overflow.
    """
    targets = torch.tensor([id for ids, last in windows for id in ids[-last:]])
    theirs = torch.cat([runtime.log_probs(ids[:-1], last, _TOP_K) for ids, last in windows])
    if wrong := int(theirs.isnan().any(-1).sum()):
        report.add("positions whose log-probabilities are NaN", wrong, 0, f"of {len(theirs)}", _OVERFLOW)
        return None
    prompt = windows[0][0][: min(_PROMPT, len(windows[0][0]) - 1)]
    written = runtime.greedy(prompt, min(_WRITTEN, runtime.context - len(prompt)))
    read = [*windows, ([*prompt, *written], len(written))]
    ours = _log_probs(model, windows)
    if not contents.tensors and bits_of(contents.kind) is not None:
        model, contents = _quantized_like(model, contents)
    dynamic = any("dynamic" in kind for kind in contents.kinds.values())
    # The latent's norm as transformers has it in a DeepSeek.
    norms = [part for name, part in model.named_modules() if name.endswith("kv_a_norm")]
    latent = with_attributes(norms if runtime.name == "transformers" else [], eps=_LATENT_EPS)
    with as_exported(model, contents), latent:
        own = _log_probs(model, read)
        with with_rounded_inputs(model, contents.kinds if runtime.rounds_inputs or dynamic else {}):
            rounded = _log_probs(model, read)
        many = len(theirs)
        rounding = divergence(own[:many], rounded[:many].masked_fill(theirs == -math.inf, -math.inf))
        most = max(_OF_ROUNDING * rounding, _LEAST_KL)
        if dynamic:  # the format itself rounds inputs, so that is what the runtime must compute
            own = rounded
        found = divergence(own[:many], theirs)
        known = found <= most or _cannot_hold(contents, model)
        cause = None if known else find_cause(model, windows[0][0][:-1], theirs[: windows[0][1]])
    said = f"nats; rounding inputs as the runtime does makes {rounding:.2g} in our model"
    report.add("KL from the export's own numbers", found, most, said, cause)
    if contents.kind == "F32" and any("ffn_gate" in piece.theirs for piece in contents.pieces):
        # An approximation of the FFN, not only a rounding.
        off, by_rounding = (_largest_gap(own[:many], rows) for rows in (theirs, rounded[:many]))
        limit = max(_MOST_OFF, _OF_ROUNDING * by_rounding)
        report.add("log-probabilities: largest difference", off, limit, "nats, of the reported tokens", cause)
    # Each token that the runtime writes is looked at given what it wrote before, so one near tie is one, not a
    # continuation that has gone another way.
    margins = own[many:].amax(-1) - own[many:].gather(1, torch.tensor(written)[:, None])[:, 0]
    tie = max(_LEAST_TIE, _TIE * math.sqrt(2 * most))
    said = f"share of {len(written)}, by more than {tie:.2g} nats in our model with the export's numbers"
    cause = "token by token the runtime computes something else than at once" if found <= most else None
    report.add("written tokens: that differ", float((margins > tie).float().mean()), _WRITTEN_OTHERWISE, said, cause)
    _add_cost(report, ours, theirs, targets)
    return own[: windows[0][1]], most


def _log_probs(model: Decoder, windows: Sequence[tuple[list[int], int]]) -> Tensor:
    """What follows each of the last tokens of windows, [n, v]."""
    return torch.cat([log_probs(model, ids[:-1], last) for ids, last in windows])


def _largest_gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of log-probabilities, [n, v], of tokens that the second reports."""
    one, other = reported_only(ours, theirs)
    return float((one - other).masked_fill(theirs == -math.inf, 0).abs().max())


def _add_cost(report: Report, ours: Tensor, theirs: Tensor, targets: Tensor) -> None:
    """Add the figures of how far rounding takes the checkpoint; no verdict."""
    kl, other = divergence(ours, theirs), float((ours.argmax(-1) != theirs.argmax(-1)).double().mean())
    reported = theirs.gather(1, targets[:, None])[:, 0] > -math.inf
    nats = [-rows.gather(1, targets[:, None])[reported].mean() for rows in reported_only(ours, theirs)]
    change = math.expm1(float(nats[1] - nats[0]))
    few = "" if reported.all() else f", of {int(reported.sum())} tokens"
    report.add("cost: KL from the checkpoint", kl, None, "nats")
    report.add("cost: likeliest tokens that are others", other, None, "share")
    said = f"relative change: {float(nats[0].exp()):.5g} -> {float(nats[1].exp()):.5g}{few}"
    if reported.any():
        report.add("cost: perplexity", change, None, said)
    if kl > _MUCH_KL or other > _MUCH_OTHER or change > _MUCH_PERPLEXITY:
        report.warnings.append(
            f"{report.kind} costs much here: perplexity {change:+.0%}, {other:.0%} other likeliest tokens, KL {kl:.2g} "
            "nats. Take a type of more bits, or train with quantization.qat=true."
        )


def _cannot_hold(contents: Contents, model: Decoder) -> bool:
    """Whether an export differs in what our model cannot be given, which is reported already."""
    wrong = differing(contents.settings, settings_of(model))
    lacking = [name for name in contents.missing if not name.endswith(".bias")]
    other = not wrong and differing_parts(contents.computation, model)
    return bool(
        contents.unknown or lacking or other or set(wrong) - {"norm.eps", "attention.rope_theta", "max_seq_len"}
    )


def _quantized_like(model: Decoder, contents: Contents) -> tuple[Decoder, Contents]:
    """The checkpoint quantized as a program is (itself where it is quantized already), and the numbers of that."""
    if not is_quantized(model):
        from plmtune.export.executorch import executorch_formats
        from plmtune.quantization.quantize import quantize

        model = copy.deepcopy(model)
        scheme = "int8_dynamic" if bits_of(contents.kind) == 8 else "int8_dynamic_int4"
        quantize(model, executorch_formats(model, scheme))
    held = {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, Quantized)}
    numbers = {name: part.dequantize() for name, part in held.items()}
    kinds = {name: part.format.name for name, part in held.items()}
    return model, replace(contents, tensors=numbers, kinds=kinds)
