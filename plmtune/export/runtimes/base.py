"""The interface of all runtimes."""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer import Tokenizer

UNVERIFIED = ".unverified"  # ends the name of an export that failed its verification
DEFAULT_CONTEXT = 4096  # a cache for all positions of a model may exceed the memory


def form_of(path: Path) -> str:
    """The ending by which a file's form is known, also of one that failed its verification."""
    return path.with_name(path.name.removesuffix(UNVERIFIED)).suffix


@dataclass(frozen=True)
class Timing:
    """Seconds.

    Attributes:
        prompt: of reading the prompt into an empty cache, up to the first token.
        token: of each later token.
    """

    prompt: float
    token: float


class InferenceRuntime(AbstractContextManager["InferenceRuntime"]):
    """A model, opened by the program that serves it. A context manager that frees the memory at its end.

    Attributes:
        name: of the program.
        path: what was opened.
        vocab_size: rows of the vocabulary.
        context: tokens that fit into the cache.
        newest: the likeliest token after those of the cache.
        rounds_inputs: whether it multiplies by inputs that it rounds as the matrix's type has it.
        tokenizer: ours, where the program has none of its own.
    """

    name: str
    path: Path
    vocab_size: int
    context: int
    newest: int
    rounds_inputs = False
    tokenizer: Tokenizer | None = None

    @abstractmethod
    def clear(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def read(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        """Append ids to the cache and return the logits that follow each of the last `last` of them, [last, v].

        Args:
            top_k: how many of the likeliest tokens are needed; a runtime for which others cost time gives them -inf.
                None: all.
        """

    def log_probs(self, ids: Sequence[int], last: int, top_k: int | None = None) -> Tensor:
        """What follows each of the last `last` prefixes of ids: fp32 log-probabilities on the CPU, [last, v].

        The first row follows ids[: len(ids) - last + 1], the last row follows all of them. They may be normalized over
        the `top_k` likeliest tokens alone, see `read`.
        """
        return self._read_anew(ids, last, top_k).float().log_softmax(-1).cpu()

    def start(self, ids: Sequence[int]) -> int:
        """Read ids into an empty cache and return the likeliest next one."""
        self.newest = int(self._read_anew(ids, 1, 1)[0].argmax())
        return self.newest

    def _read_anew(self, ids: Sequence[int], last: int, top_k: int | None) -> Tensor:
        if not 1 <= last <= len(ids):
            raise ValueError(f"{last} rows cannot be given for {len(ids)} tokens")
        if len(ids) > self.context:
            raise ValueError(f"{len(ids)} tokens exceed the context of {self.context} that {self.path} was opened with")
        self.clear()
        return self.read(ids, last, top_k)

    def step(self, id: int) -> int:
        """Append one id to the cache and return the likeliest next one."""
        self.newest = int(self.read((id,), 1, 1)[0].argmax())
        return self.newest

    def encode(self, text: str) -> list[int] | None:
        """The runtime's own ids of a text, with what it puts before one; special tokens' text stands for the tokens.

        None: it has no tokenizer.
        """
        if self.tokenizer is None:
            return None
        return self.tokenizer.with_bos(self.tokenizer.encode(text, specials=True))

    def render(self, messages: Sequence[Message]) -> str | None:
        """The text of a conversation up to where the model begins to write; None: there is no template."""
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            return None
        template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer, str(self.path))
        return template.render(messages, add_generation_prompt=True)

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow ids, the likeliest each time, whatever ends a text."""
        written = [self.start(ids)]
        while len(written) < n:
            written.append(self.step(written[-1]))
        return written

    def timed(self, ids: Sequence[int], n: int) -> Timing:
        """Read ids into an empty cache and write n more tokens after the first, as the runtime does for its users."""
        start = time.perf_counter()
        self.start(ids)
        return Timing(time.perf_counter() - start, self.timed_steps(n))

    def timed_steps(self, n: int) -> float:
        """Write n tokens after the newest; return the median of their seconds."""
        taken = []
        for _ in range(n):
            start = time.perf_counter()
            self.step(self.newest)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    @abstractmethod
    def close(self) -> None:
        """Free the model."""

    def __exit__(self, *_: object) -> None:
        self.close()
