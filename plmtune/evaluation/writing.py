"""Answers as text: prompts of ids in, what the model writes up to a stop out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from plmtune.errors import UserError
from plmtune.evaluation.scoring import NotFinite, out_of_memory
from plmtune.inference import batching
from plmtune.inference.batching import Answer, BatchedGenerator, FinishReason, Request
from plmtune.inference.sampling import before_stop, check_sampling, encode_stops
from plmtune.training.estimate import available_memory

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.tokenizer import Tokenizer

# Of the memory that is free, what the cache may take; the rest is for reading prompts.
_SHARE = 0.5
# Above so many rows a step takes longer in proportion, so that nothing is gained.
_MOST_ROWS = {"cpu": 32}
_MOST_ROWS_ELSEWHERE = 256


Sampling = tuple[float, int | None, float | None, float | None, float]


@dataclass(frozen=True)
class Prompt:
    """What is to be continued.

    Attributes:
        tokens: ids; where they leave too little room, the first are left out.
        max_new_tokens: the answer is cut here.
        until: the answer ends before the first of these texts. A special token's text is one, too.
        temperature: 0 takes the likeliest token.
        top_k, top_p, min_p: see `plmtune.inference.sampling.sample`.
        repetition_penalty: see `plmtune.inference.sampling.penalize`; 1 for none.
        seed: decides all draws.
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
    def sampling(self) -> Sampling:
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


@dataclass(frozen=True)
class Written:
    """An answer.

    Attributes:
        text: without special tokens, cut before the first of `until`; bytes that are no UTF-8 are U+FFFD.
        tokens: all that was written for it, without the id that ended it.
        why: one of `until` came, an id that ends texts, or neither.
    """

    text: str
    tokens: list[int]
    why: FinishReason


class Writer:
    """Continue prompts, many at a time.

    Args:
        model: the model.
        tokenizer: its tokenizer; its end of a text ends an answer.
        batch_size: rows that are written together; None: as many as memory has room for. Halved when it runs out.
        end_ids: these end an answer, too.
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
        """Yield each prompt's index and answer, as they end.

        Args:
            prompts: of any settings; those of equal sampling are written together.
            known: indexes that are left out.

        Raises:
            ValueError: for a prompt that cannot be continued.
            NotFinite: where the model gives NaN.
        """
        known = frozenset(known)
        return self._write(prompts, [self._request(i, prompt) for i, prompt in enumerate(prompts) if i not in known])

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
            check_sampling(*prompt.sampling)
        except ValueError as error:
            raise ValueError(f"prompt {index}: {error}") from error
        until = encode_stops([text for text in prompt.until if text])
        tokens = prompt.tokens[-(limit - prompt.max_new_tokens) :]
        return Request(str(index), tokens, prompt.max_new_tokens, prompt.seed, until)

    def _write(self, prompts: Sequence[Prompt], requests: list[Request]) -> Iterator[tuple[int, Written]]:
        device = self.model.device
        waiting = {int(request.key): request for request in requests}
        for sampling in dict.fromkeys(prompts[index].sampling for index in waiting):
            alike = {index: request for index, request in waiting.items() if prompts[index].sampling == sampling}
            rows = self.batch_size or self._rows(list(alike.values()))
            while alike:
                try:
                    for answer in self._run(alike.values(), rows, sampling):
                        index = int(answer.key)
                        del alike[index]
                        yield index, self._written(answer, prompts[index].until)
                except batching.NotFinite as error:
                    raise NotFinite(int(error.key)) from error
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    if rows == 1:
                        raise UserError(
                            f"Memory does not suffice for one prompt of {len(next(iter(alike.values())).tokens):,} "
                            f"tokens on {device}. End other programs, or load the model with a smaller dtype."
                        ) from error
                    # What is not answered yet begins anew; its seed makes it the same.
                    rows = min(rows // 2, len(alike))
                # Only here is the exception gone, which held what the engine had.
                if device.type == "cuda":
                    torch.cuda.empty_cache()

    def _run(self, requests: Collection[Request], rows: int, sampling: Sampling) -> Iterator[Answer]:
        temperature, top_k, top_p, min_p, repetition_penalty = sampling
        engine = BatchedGenerator(
            self.model,
            batch_size=min(rows, len(requests)),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            end_ids=self.end_ids,
            num_tokens=self.tokenizer.num_tokens,
            decode_bytes=self.tokenizer.decode_bytes,
        )
        for request in requests:
            engine.submit(request)
        yield from engine.run()

    def _rows(self, requests: Sequence[Request]) -> int:
        """Return how many rows the cache has room for, where all are as long as the longest."""
        device = self.model.device
        longest = max(len(request.tokens) + request.max_new_tokens for request in requests)
        row = self.model.new_cache(1, 1).nbytes * longest
        most = _MOST_ROWS.get(device.type, _MOST_ROWS_ELSEWHERE)
        return max(1, min(most, int(available_memory(device) * _SHARE) // row))

    def _written(self, answer: Answer, until: Sequence[str]) -> Written:
        text = self.tokenizer.decode([token for token in answer.tokens if token not in self._silent])
        return Written(before_stop(text, until), answer.tokens, answer.finish_reason)
