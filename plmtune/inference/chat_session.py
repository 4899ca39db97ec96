"""A conversation with a model: what was said, and what of it the model still sees."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from plmtune.inference.sampling import PrefixCache, complete
from plmtune.tokenizers.message import BadRow, Message

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.chat_template import ChatTemplate
    from plmtune.tokenizers.tokenizer import Tokenizer

# A chat template is rendered once for each answer, so that very many short turns would take longer than the model.
_MOST_MESSAGES = 400


class ChatSession:
    """Questions and answers over one cache: of each turn only what is new is computed.

    Attributes:
        system: what the model is told before all else, or None; set by `instruct`.
        messages: user and assistant in turn, each answer as far as it came.
        forgotten: messages at their beginning that the model no longer sees, for want of room.
        cut: whether the latest answer was cut at max_new_tokens or at the model's max_seq_len.
        context: tokens that the model has seen, the latest answer included.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.system: str | None = None
        self.messages: list[Message] = []
        self.forgotten = 0
        self.cut = False
        self._prefix_cache = PrefixCache(model)

    @property
    def context(self) -> int:
        return len(self._prefix_cache.ids)

    def instruct(self, system: str | None) -> None:
        """Put `system` before all that was and will be said.

        Raises:
            BadRow: if the chat template refuses it, or it holds the text of a special token; then nothing changes.
        """
        if system is not None:
            self.template.encode_prompt([Message("system", system), Message("user", "a")])
        self.system = system

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        until: Sequence[str] = (),
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """Yield the answer to a user's message, a piece a token.

        However it ends (all of it, an interrupt, `close`), both then belong to the conversation, the answer as far as
        it came; but neither where there is no answer.

        Raises:
            BadRow: if the chat template refuses the message, or it holds the text of a special token.
            ValueError: for a message longer than the model's max_seq_len, or impossible settings.
            FloatingPointError: if the model's output is not a number.
        """
        prompt = self._prompt(text, max_new_tokens)
        room = min(max_new_tokens, self.model.max_seq_len - len(prompt))
        # No message can hold a special token, so any of them ends an answer.
        ends = {self.template.end_id, *self.tokenizer.end_ids, *self.tokenizer.specials.values()}
        pieces = complete(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=room,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            until=until,
            seed=seed,
            end_ids=ends,
            prefix_cache=self._prefix_cache,
        )
        answer = ""
        try:
            for piece in pieces:
                answer += piece
                yield piece
            written = self._prefix_cache.ids[len(prompt) :]
            whole = self.tokenizer.decode(written)
            self.cut = len(written) == room and written[-1] not in ends and not any(stop in whole for stop in until)
        finally:
            for special in self.tokenizer.specials:  # spelled out in other tokens
                answer = answer.partition(special)[0]
            if answer.strip():
                self.messages += [Message("user", text), Message("assistant", answer)]

    @property
    def transcript(self) -> list[Message]:
        """All that was said, the system's message first."""
        return [*([Message("system", self.system)] if self.system is not None else []), *self.messages]

    def restore(self, messages: Sequence[Message]) -> None:
        """Go on from a transcript instead of what was said here.

        Raises:
            BadRow: if it is not of user and assistant in turn, behind a system's message at most, the chat template
                refuses it, or it holds the text of a special token; then nothing changes.
        """
        systems = 1 if messages and messages[0].role == "system" else 0
        roles = [message.role for message in messages[systems:]]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise BadRow("is no talk of user and assistant in turn that ends in an answer")
        self.template.encode_prompt([*messages, Message("user", "a")])
        self.system = messages[0].content if systems else None
        self.messages, self.forgotten = list(messages[systems:]), 0

    def undo(self) -> Message | None:
        """Drop the latest question and its answer; return the question, or None where there is none."""
        if not self.messages:
            return None
        question = self.messages[-2]
        del self.messages[-2:]
        self.forgotten = min(self.forgotten, len(self.messages))
        return question

    def reset(self) -> None:
        """Drop all that was said; `system` stays."""
        self.messages, self.forgotten = [], 0

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        """Return what the model reads; the oldest messages are forgotten where there is no room for them."""
        limit = self.model.max_seq_len
        first = [Message("system", self.system)] if self.system is not None else []
        most, forgotten = limit - min(max_new_tokens, limit // 4), self.forgotten
        while True:
            kept = self.messages[forgotten:]
            ids: list[int] = []
            if len(kept) <= _MOST_MESSAGES:
                ids = self.template.encode_prompt([*first, *kept, Message("user", text)]).tolist()
                if len(ids) <= most or not kept:
                    break
                # Then all is read again, other than in a turn that goes on: make room for more than this one.
                most = min(most, limit // 2)
            forgotten += 2
        if len(ids) >= limit:
            told = ", what the system says included," if first else ""
            raise ValueError(f"the message{told} has {len(ids)} tokens, the model's max_seq_len is {limit}")
        self.forgotten = forgotten
        return ids
