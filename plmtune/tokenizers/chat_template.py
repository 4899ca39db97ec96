"""Chat templates: a conversation becomes text, tokens, and a mask of the tokens to train on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.errors import UserError, did_you_mean
from plmtune.tokenizers.answers import OTHERWISE, Answers
from plmtune.tokenizers.builtin_templates import NAMED
from plmtune.tokenizers.message import BadRow, Message, Unused, texts_in
from plmtune.tokenizers.rendering import Renderer
from plmtune.tokenizers.template_sandbox import MAX_TEMPLATE
from plmtune.tokenizers.tokenizer import Tokenizer

TrainOn = Literal["all", "last"]
Ids = NDArray[np.int32]
Encoded = tuple[Ids, NDArray[np.bool_]]

# For tokenizers whose files name no such token.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
_MAX_TURNS = 1000


class ChatTemplate:
    """How conversations become tokens.

    Attributes:
        source: the Jinja text.
        where: its origin, for messages.
        end_id: the token that ends an answer.
        fingerprint: xxh3-128 of everything that decides the text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str) -> None:
        """Compile the template and try it on a question and an answer.

        Raises:
            UserError: if it is no template, fails, or does not mark where an answer begins and ends.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.where = where
        self._variables: dict[str, Any] = {"tools": None, "documents": None, "eos_token": tokenizer.eos}
        self._variables["pad_token"] = tokenizer.eos
        bos = tokenizer.bos or next((name for name in _BOS_NAMES if name in tokenizer.specials), None)
        if bos is not None:
            self._variables["bos_token"] = bos
        specials = sorted(tokenizer.specials, key=len, reverse=True)  # of two with a common beginning, the longer
        self._special_ids = {text: np.array([found], np.int32) for text, found in tokenizer.specials.items()}
        self._specials = re.compile("|".join(map(re.escape, specials)))
        self._renderer = Renderer(source, self._variables, where)
        self._answers = Answers(self._renderer, self._specials, list(tokenizer.specials))
        self._question, end = self._try()
        self.end_id = int(self._encode([[end]])[0][0][-1])

    @cached_property
    def fingerprint(self) -> str:
        """The xxh3-128 of everything that decides the text."""
        return xxhash.xxh3_128_hexdigest(repr((self.source, sorted(self._variables.items(), key=str))).encode())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, as apply_chat_template of transformers; BadRow if the template fails."""
        return self._renderer.render(messages, add_generation_prompt)[0]

    def segments(
        self, messages: Sequence[Message], train_on: TrainOn = "all", unused: Unused | None = None
    ) -> list[tuple[str, bool]]:
        """Cut the text of a conversation into (text, whether it is trained on): answers, each with its end token.

        Args:
            messages: a conversation, as `Conversation.messages`. Their flags narrow `train_on`.
            train_on: all answers, or the last one.
            unused: counts keys that the template does not write and need not write.

        Raises:
            BadRow: if the template refuses it or leaves out content, a message contains the text of a special token,
                there is nothing to train on, or the text does not show where answers begin and end.
        """
        self._check(messages)
        text, spans = self._renderer.render(messages)
        messages, ignored = self._renderer.honoured(messages, text)
        answers, left_out = self._answers.find(messages, text, spans)
        if not answers:
            raise BadRow("has no assistant turn")
        out, at = [], 0
        turns = [message for message in messages if message.role == "assistant"]
        for number, (message, parts) in enumerate(zip(turns, answers, strict=True), 1):
            learned = message.trained is not False and (train_on == "all" or number == len(answers))
            for begin, end in parts:
                out.append((text[at:begin], False))
                for cut in self._unmasked(message, text, begin, end) if learned else [(begin, end, False)]:
                    out.append((text[cut[0] : cut[1]], cut[2]))
                at = end
        if not any(trained for _, trained in out):
            raise BadRow("has no answer that is to be learned: its messages say so (weight 0, train false)")
        if unused is not None:
            unused.add([*ignored, *left_out])
        return [(text, trained) for text, trained in [*out, (text[at:], False)] if text]

    def encode(self, messages: Sequence[Message], train_on: TrainOn = "all", unused: Unused | None = None) -> Encoded:
        """Return a conversation's tokens [n] int32, and the mask of those to train on [n] bool.

        Raises:
            BadRow: see `segments`.
        """
        (encoded,) = self.encode_batch([messages], train_on, unused)
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], train_on: TrainOn = "all", unused: Unused | None = None
    ) -> list[Encoded | BadRow]:
        """Encode many conversations at once, as `encode`; a bad one gives its BadRow."""
        cut: list[list[tuple[str, bool]] | BadRow] = []
        for messages in conversations:
            try:
                cut.append(self.segments(messages, train_on, unused))
            except BadRow as error:
                cut.append(error)
        encoded = iter(self._encode([[text for text, _ in held] for held in cut if not isinstance(held, BadRow)]))
        out: list[Encoded | BadRow] = []
        for held in cut:
            if isinstance(held, BadRow):
                out.append(held)
                continue
            parts = next(encoded)
            trained = np.repeat([flag for _, flag in held], [part.size for part in parts])
            ids = self._with_bos(np.concatenate(parts))
            out.append((ids, np.concatenate([np.zeros(ids.size - trained.size, np.bool_), trained])))
        return out

    def encode_prompt(self, messages: Sequence[Message], unused: Unused | None = None) -> Ids:
        """Return the tokens [n] of a conversation with the generation prompt.

        Args:
            messages: the last is the user's, or a tool's.
            unused: see `segments`.

        Raises:
            BadRow: if the template refuses them or leaves out content, or a message contains the text of a special
                token.
        """
        self._check(messages)
        text, spans = self._renderer.render(messages, add_generation_prompt=True)
        messages, ignored = self._renderer.honoured(messages, text, add_generation_prompt=True)
        # Cut as in training, so that earlier answers give the same tokens.
        try:
            answers, left_out = self._answers.find(messages, text, spans, add_generation_prompt=True)
        except BadRow:  # it cannot be trained on, but continued
            answers, left_out = [], []
        if unused is not None:
            unused.add([*ignored, *left_out])
        begins = [parts[0][0] for parts in answers]
        cuts = [0, *begins, len(text)]
        return self._with_bos(np.concatenate(self._encode([[text[a:b] for a, b in pairwise(cuts)]])[0]))

    def encode_answer(self, answer: str | Message, unused: Unused | None = None) -> Ids:
        """Return the tokens [n] of an answer as the template writes it; the last is `end_id`.

        Args:
            answer: a text, or the assistant's message.
            unused: see `segments`.

        Raises:
            BadRow: if the answer contains the text of a special token, or the template refuses or shortens it.
        """
        said = Message("assistant", answer) if isinstance(answer, str) else answer
        messages: Sequence[Message] = (*self._question, said)
        self._check(messages)
        prompt = self.render(self._question, add_generation_prompt=True)
        written, spans = self._renderer.render(messages)
        if not written.startswith(prompt):
            raise BadRow(f"has an answer that {OTHERWISE}")
        if said.more:
            messages, ignored = self._renderer.honoured(messages, written)
            if unused is not None:
                unused.add(ignored)
        answers, _ = self._answers.find(messages, written, spans)
        end = answers[-1][-1][1]
        return self._encode([[prompt, written[len(prompt) : end]]])[0][1]

    def _try(self) -> tuple[tuple[Message, ...], str]:
        """Return a question that the template accepts, and the text of an answer to it."""
        asked = (Message("user", "a"),)
        failures = []
        for messages in (asked, (Message("system", "c"), *asked)):
            try:
                segments = self.segments((*messages, Message("assistant", "b")))
                written = "".join(text for text, _ in segments)
                if not any(written.startswith(self.render(messages, prompt)) for prompt in (True, False)):
                    raise BadRow(f"has an answer (turn {len(messages) + 1}) that {OTHERWISE}")
                return messages, [text for text, trained in segments if trained][-1]
            except BadRow as error:
                failures.append(str(error))
        raise UserError(f"{self.where} cannot be used: a conversation of one question and answer {failures[0]}")

    def _check(self, messages: Sequence[Message]) -> None:
        if len(messages) > _MAX_TURNS:  # each answer takes a rendering of all turns before it
            raise BadRow(f"has more than {_MAX_TURNS:,} turns")
        for number, message in enumerate(messages, 1):
            for text in (message.content, *texts_in(message.more)):
                if found := self._specials.search(text):
                    raise BadRow(
                        f"holds the text of the special token {found.group()} in turn {number} ({message.role}): "
                        "the model would take it for the token itself"
                    )

    def _unmasked(self, message: Message, text: str, begin: int, end: int) -> list[tuple[int, int, bool]]:
        """Cut an answer, [begin, end) of a text, into (begin, end, whether it is trained on)."""
        if not message.masked:
            return [(begin, end, True)]
        said = message.content.strip()
        # Special tokens are no part of the content, and are not cut.
        marks = [found.span() for found in self._specials.finditer(text, begin, end)]
        stop = next((first for first, last in reversed(marks) if not text[last:end].strip()), end)
        start = text.find(said, begin, stop)
        if start < 0 or text.find(said, start + 1, stop) >= 0:
            times = "not at all" if start < 0 else "more than once"
            raise BadRow(f"has an answer with parts that are not to be learned, which the chat template writes {times}")
        start -= len(message.content) - len(message.content.lstrip())
        cuts, at = [], begin
        for first, last in message.masked:
            first, last = (min(max(begin, start + place), stop) for place in (first, last))
            cuts += [(at, first, True), (first, last, False)]
            at = last
        return [cut for cut in [*cuts, (at, end, True)] if cut[0] < cut[1]]

    def _with_bos(self, ids: Ids) -> Ids:
        """Put bos before a conversation if the tokenizer adds it and the template has not written it."""
        return np.array(self.tokenizer.with_bos(ids.tolist()), np.int32) if self.tokenizer.adds_bos else ids

    def _encode(self, conversations: Sequence[Sequence[str]]) -> list[list[Ids]]:
        """Return the tokens of each conversation's parts, special tokens included."""
        if self.tokenizer.depends_on_place:
            return [[ids.astype(np.int32) for ids in parts] for parts in self.tokenizer.encode_parts(conversations)]
        cut: list[list[str]] = []
        texts = [text for parts in conversations for text in parts]
        for text in texts:
            pieces, at = [], 0
            for found in self._specials.finditer(text):
                pieces += [text[at : found.start()], found.group()]
                at = found.end()
            cut.append([piece for piece in (*pieces, text[at:]) if piece])
        plain = list({piece: None for pieces in cut for piece in pieces if piece not in self._special_ids})
        encoded = [ids.astype(np.int32) for ids in self.tokenizer.encode_batch(plain)]
        known = self._special_ids | dict(zip(plain, encoded, strict=True))
        nothing = np.zeros(0, np.int32)
        whole = iter([np.concatenate([nothing, *(known[piece] for piece in pieces)]) for pieces in cut])
        return [[next(whole) for _ in parts] for parts in conversations]


def find_template(name: str | None, tokenizer: Tokenizer, option: str = "chat.template=") -> ChatTemplate:
    """Return a chat template.

    Args:
        name: chatml, llama3, plain, or a file; None: the tokenizer's own.
        option: the option for a name, for messages.

    Raises:
        UserError: if there is none, or it cannot be used; see `ChatTemplate`.
    """
    if name is None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"The tokenizer has no chat template. Name one: {option}chatml, llama3, plain (for tokenizers "
                f"without tokens for turns), or a file, {option}mine.jinja"
            )
        return ChatTemplate(tokenizer.chat_template, tokenizer, "The tokenizer's chat template")
    source, where = template_source(name)
    return ChatTemplate(source, tokenizer, where)


def template_source(name: str) -> tuple[str, str]:
    """Return the text of a builtin chat template or of a file, and its origin; UserError if there is none."""
    if name in NAMED:
        return NAMED[name], f"The chat template {name}"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{name} is neither a chat template's name nor a file with one.{did_you_mean(name, NAMED)}")
    try:
        if path.stat().st_size > MAX_TEMPLATE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; a chat template has at most {MAX_TEMPLATE:,}")
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return source, str(path)
