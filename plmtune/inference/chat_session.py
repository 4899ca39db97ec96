"""A conversation with a model: its messages, and those that fit into the context."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Unpack

from plmtune.inference.sampling import PrefixCache, Sampling, complete
from plmtune.tokenizers.message import BadRow, Message

if TYPE_CHECKING:
    from plmtune.modules.decoder import Decoder
    from plmtune.tokenizers.chat_template import ChatTemplate
    from plmtune.tokenizers.tokenizer import Tokenizer

# The chat template is rendered for each answer; with more messages it would take longer than the model.
_MOST_MESSAGES = 400


class ChatSession:
    """A chat over one KV cache: each turn computes only its new tokens.

    Attributes:
        system: the system message, or None; set by `instruct`.
        messages: of user and assistant, alternating; an interrupted answer as far as it was generated.
        forgotten: number of the oldest messages that no longer fit into the context.
        cut: whether the latest answer was cut at max_new_tokens or at the model's max_seq_len.
        context: tokens in the cache, with the latest answer.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.system: str | None = None
        self.messages: list[Message] = []
        self.forgotten, self.cut = 0, False
        self._prefix_cache = PrefixCache(model)

    @property
    def context(self) -> int:
        return len(self._prefix_cache.ids)

    def instruct(self, system: str | None) -> None:
        """Set the system message; BadRow, and no change, if the chat template refuses it."""
        if system is not None:
            self.template.encode_prompt([Message("system", system), Message("user", "a")])
        self.system = system

    def ask(
        self,
        text: str,
        *,
        max_new_tokens: int,
        until: Sequence[str] = (),
        seed: int = 0,
        **sampling: Unpack[Sampling],
    ) -> Generator[str, None, None]:
        """Yield the answer to a user's message, one piece a token.

        At the end, also after an interrupt or `close`, both are added to `messages`, the answer as far as it came. An
        empty answer adds neither.

        Raises:
            BadRow: if the chat template refuses the message, or it holds the text of a special token.
            ValueError: for a message longer than the model's max_seq_len, or settings out of their range.
            FloatingPointError: if the model's output is not a number.
        """
        prompt = self._prompt(text, max_new_tokens)
        room = min(max_new_tokens, self.model.max_seq_len - len(prompt))
        # No message can contain a special token, so each of them ends an answer.
        ends = {self.template.end_id, *self.tokenizer.end_ids, *self.tokenizer.specials.values()}
        pieces = complete(
            self.model,
            self.tokenizer,
            prompt,
            max_new_tokens=room,
            until=until,
            seed=seed,
            end_ids=ends,
            prefix_cache=self._prefix_cache,
            **sampling,
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
            for special in self.tokenizer.specials:  # written with ordinary tokens
                answer = answer.partition(special)[0]
            if answer.strip():
                self.messages += [Message("user", text), Message("assistant", answer)]

    @property
    def _instructions(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    @property
    def transcript(self) -> list[Message]:
        """The system message and all messages."""
        return self._instructions + self.messages

    def restore(self, messages: Sequence[Message]) -> None:
        """Replace the messages by a transcript.

        Nothing changes where it raises BadRow: user and assistant alternate after an optional system message, and the
        chat template takes them.
        """
        systems = 1 if messages and messages[0].role == "system" else 0
        roles = [message.role for message in messages[systems:]]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise BadRow("does not alternate user and assistant, with an answer at the end")
        self.template.encode_prompt([*messages, Message("user", "a")])
        self.system = messages[0].content if systems else None
        self.messages, self.forgotten = list(messages[systems:]), 0

    def undo(self) -> Message | None:
        """Remove the latest question and its answer; return the question, or None if there is none."""
        if not self.messages:
            return None
        question = self.messages[-2]
        del self.messages[-2:]
        self.forgotten = min(self.forgotten, len(self.messages))
        return question

    def reset(self) -> None:
        """Remove all messages but the system message."""
        self.messages, self.forgotten = [], 0

    def _prompt(self, text: str, max_new_tokens: int) -> list[int]:
        """Return the ids of the conversation, without its oldest messages if there is no room for them."""
        limit = self.model.max_seq_len
        first = self._instructions
        most, forgotten = limit - min(max_new_tokens, limit // 4), self.forgotten
        while True:
            kept = self.messages[forgotten:]
            ids: list[int] = []
            if len(kept) <= _MOST_MESSAGES:
                ids = self.template.encode_prompt([*first, *kept, Message("user", text)]).tolist()
                if len(ids) <= most or not kept:
                    break
                # The whole prompt is then read again, so make room for more than this turn.
                most = min(most, limit // 2)
            forgotten += 2
        if len(ids) >= limit:
            with_system = " with the system message" if first else ""
            raise ValueError(f"the message{with_system} has {len(ids)} tokens, the model's max_seq_len is {limit}")
        self.forgotten = forgotten
        return ids
