"""Generation of answers: prompts of ids in, text up to a stop out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plmtune.errors import LogitsNotFinite, UserError
from plmtune.evaluation.scoring import out_of_memory
from plmtune.inference.batching import BatchedGenerator, FinishReason
from plmtune.inference.request_queue import Request
from plmtune.inference.sampling import before_stop, check_sampling, encode_stops
from plmtune.training.machine import available_memory

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.tokenizer import Tokenizer

# The cache's share of the free memory; the rest is for prefill.
_SHARE = 0.5
# With more rows the time of a step grows in proportion.
_MOST_ROWS_CPU, _MOST_ROWS_GPU = 32, 256


@dataclass(frozen=True)
class Prompt:
    """A prompt and how to continue it.

    Attributes:
        tokens: ids; the first are dropped if they leave too little room.
        max_new_tokens: longest answer.
        until: the answer ends before the first of these texts, which may be the texts of special tokens.
        temperature: 0 for greedy decoding.
        top_k, top_p, min_p: see `plmtune.inference.sampling.sample`.
        repetition_penalty: see `plmtune.inference.sampling.penalize`; 1 for none.
        seed: of the sampling.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that prompts of one batch share."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        text: without special tokens, up to the first of `until`; bytes that are no UTF-8 become U+FFFD.
        tokens: all generated ids, without the one that ended the answer.
        finish_reason: one of `until` came, an id that ends texts, or neither.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason


class Writer:
    """Continue prompts, many at a time.

    Args:
        tokenizer: the model's; its end tokens end an answer.
        batch_size: rows that are generated together, halved when memory runs out; None: as many as fit.
        end_ids: further ids that end an answer.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, batch_size: int | None = None, end_ids: Collection[int] = ()
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.end_ids = frozenset({*tokenizer.end_ids, *end_ids})
        self._silent = frozenset(tokenizer.specials.values())

    def write(self, prompts: Sequence[Prompt], known: Collection[int] = ()) -> Iterator[tuple[int, Written]]:
        """Yield each prompt's index and answer, in the order in which they end.

        Args:
            prompts: with any settings; those with equal sampling are generated together.
            known: indices to leave out.
        """
        known = frozenset(known)
        requests = {i: self._request(i, prompt) for i, prompt in enumerate(prompts) if i not in known}
        return self._write(prompts, requests)

    def _request(self, index: int, prompt: Prompt) -> Request:
        limit = self.model.max_seq_len
        if prompt.max_new_tokens >= limit:
            raise ValueError(
                f"prompt {index}: max_new_tokens ({prompt.max_new_tokens}) leaves no room for a prompt: it must be "
                f"below the model's max_seq_len ({limit})"
            )
        if len(prompt.tokens) == 0:
            raise ValueError(f"prompt {index} is empty: at least one token is needed to start from")
        try:
            check_sampling(**prompt.sampling)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
        until = encode_stops([text for text in prompt.until if text])
        tokens = prompt.tokens[-(limit - prompt.max_new_tokens) :]
        return Request(str(index), tokens, prompt.max_new_tokens, prompt.seed, until)

    def _write(self, prompts: Sequence[Prompt], waiting: dict[int, Request]) -> Iterator[tuple[int, Written]]:
        while waiting:
            sampling = prompts[next(iter(waiting))].sampling
            batch = {index: request for index, request in waiting.items() if prompts[index].sampling == sampling}
            waiting = {index: request for index, request in waiting.items() if index not in batch}
            rows = self.batch_size or self._rows(batch.values())
            while batch:
                engine = BatchedGenerator(
                    self.model,
                    batch_size=min(rows, len(batch)),
                    end_ids=self.end_ids,
                    num_tokens=self.tokenizer.num_tokens,
                    decode_bytes=self.tokenizer.decode_bytes,
                    **sampling,
                )
                for request in batch.values():
                    engine.submit(request)
                try:
                    for answer in engine.run():
                        index = int(answer.key)
                        del batch[index]
                        ids = [token for token in answer.tokens if token not in self._silent]
                        text = before_stop(self.tokenizer.decode(ids), prompts[index].until)
                        yield index, Written(text, answer.tokens, answer.finish_reason)
                except LogitsNotFinite as error:
                    raise LogitsNotFinite(int(error.item)) from error
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if rows == 1:
                        raise UserError(
                            f"Memory does not suffice for one prompt of {len(next(iter(batch.values())).tokens):,} "
                            f"tokens on {self.model.device}. End other programs, or load the model with a smaller "
                            "dtype."
                        ) from error
                    # Unfinished answers start again; with their seeds they are the same.
                    rows = min(rows // 2, len(batch))
                del engine  # with its memory, which the exception held, too
                if self.model.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _rows(self, requests: Collection[Request]) -> int:
        """Return how many rows of the longest length fit into the cache."""
        device = self.model.device
        longest = max(len(request.tokens) + request.max_new_tokens for request in requests)
        row = self.model.new_cache(1, 1).nbytes * longest
        most = _MOST_ROWS_CPU if device.type == "cpu" else _MOST_ROWS_GPU
        return max(1, min(most, int(available_memory(device) * _SHARE) // row))
