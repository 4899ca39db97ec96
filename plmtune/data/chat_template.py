"""Chat templates: Jinja that turns a conversation into text, and that text into tokens and what is learned of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import xxhash
from numpy.typing import NDArray

from plmtune.data.rows import Message
from plmtune.data.sources import BadRow
from plmtune.data.template_sandbox import MAX_TEXT, Sandbox
from plmtune.data.tokenizers import CHATML_TEMPLATE, Tokenizer
from plmtune.errors import UserError, did_you_mean

TrainOn = Literal["all", "last"]
Ids = NDArray[np.int32]
Encoded = tuple[Ids, NDArray[np.bool_]]

NAMED = {
    "chatml": CHATML_TEMPLATE,
    "llama3": (
        "{% for message in messages %}"
        "{% if loop.first %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # For tokenizers whose only special token ends a document.
    "plain": (
        "{% for message in messages %}"
        "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
        "{{ (eos_token if message['role'] == 'assistant' else '') + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
    ),
}
# For tokenizers whose files name no such token.
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>")
_MAX_TEMPLATE = 1 << 20
_MAX_TURNS = 1000
_MARKS = "mark what the model writes with {% generation %} ... {% endgeneration %} in the template"
_OTHERWISE = f"the chat template writes otherwise than where the model is to write it (add_generation_prompt): {_MARKS}"


class ChatTemplate:
    """How conversations become tokens.

    Attributes:
        source: the Jinja text.
        where: where it comes from, for a person.
        end_id: the token that ends an answer.
        fingerprint: xxh3-128 of all that decides the text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, where: str) -> None:
        """Compile the template and try it on a question and an answer.

        Raises:
            UserError: if it is no template, fails, or does not show where an answer begins and ends.
        """
        self.source = source
        self.tokenizer = tokenizer
        self.where = where
        self._variables: dict[str, Any] = {"tools": None, "documents": None, "eos_token": tokenizer.eos}
        self._variables["pad_token"] = tokenizer.eos
        bos = tokenizer.bos or next((name for name in _BOS_NAMES if name in tokenizer.specials), None)
        if bos is not None:
            self._variables["bos_token"] = bos
        specials = sorted(tokenizer.specials, key=len, reverse=True)  # of two that start alike, the longer
        self._special_ids = {text: np.array([found], np.int32) for text, found in tokenizer.specials.items()}
        self._specials = re.compile("|".join(map(re.escape, specials)))
        if len(source) > _MAX_TEMPLATE:
            raise UserError(f"{where} has {len(source):,} characters; a chat template has at most {_MAX_TEMPLATE:,}")
        self._environment = Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where} is no Jinja template: {error.message} (line {error.lineno})") from error
        except Exception as error:  # what it computes at once, or nests too deeply
            raise UserError(f"{where} is no Jinja template: {type(error).__name__}: {error}") from error
        self._marked = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._question, end = self._try()
        self.end_id = int(self._encode([end])[0][-1])

    @cached_property
    def fingerprint(self) -> str:
        """The xxh3-128 of all that decides the text."""
        return xxhash.xxh3_128_hexdigest(repr((self.source, sorted(self._variables.items(), key=str))).encode())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, as transformers' apply_chat_template.

        Args:
            messages: any of the roles that the template knows.
            add_generation_prompt: go on to where the model begins to write.

        Raises:
            BadRow: if the template fails on them or refuses them.
        """
        return self._render(messages, add_generation_prompt)[0]

    def segments(self, messages: Sequence[Message], train_on: TrainOn = "all") -> list[tuple[str, bool]]:
        """Cut the text of a conversation into (text, whether it is learned): answers, each with its end token.

        Args:
            messages: a conversation, as `Conversation.messages`.
            train_on: learn all answers, or the last alone.

        Raises:
            BadRow: if the template refuses it, a message holds the text of a special token, or it does not show where
                the model begins to write and where an answer ends.
        """
        self._check(messages)
        text, spans = self._render(messages)
        answers = self._answers(messages, text, spans)
        if not answers:
            raise BadRow("has no assistant turn")
        out, at = [], 0
        for number, parts in enumerate(answers, 1):
            for begin, end in parts:
                out += [(text[at:begin], False), (text[begin:end], train_on == "all" or number == len(answers))]
                at = end
        return [(text, trained) for text, trained in [*out, (text[at:], False)] if text]

    def encode(self, messages: Sequence[Message], train_on: TrainOn = "all") -> Encoded:
        """Return a conversation's tokens [n] int32, and which of them are learned [n] bool.

        Raises:
            BadRow: see `segments`.
        """
        (encoded,) = self.encode_batch([messages], train_on)
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def encode_batch(
        self, conversations: Sequence[Sequence[Message]], train_on: TrainOn = "all"
    ) -> list[Encoded | BadRow]:
        """Encode many conversations at once, as `encode`: for each its tokens, or why it has none."""
        cut: list[list[tuple[str, bool]] | BadRow] = []
        for messages in conversations:
            try:
                cut.append(self.segments(messages, train_on))
            except BadRow as error:
                cut.append(error)
        encoded = iter(self._encode([text for held in cut if not isinstance(held, BadRow) for text, _ in held]))
        out: list[Encoded | BadRow] = []
        for held in cut:
            if isinstance(held, BadRow):
                out.append(held)
                continue
            parts = [next(encoded) for _ in held]
            trained = np.repeat([flag for _, flag in held], [part.size for part in parts])
            ids = self._with_bos(np.concatenate(parts))
            out.append((ids, np.concatenate([np.zeros(ids.size - trained.size, np.bool_), trained])))
        return out

    def encode_prompt(self, messages: Sequence[Message]) -> Ids:
        """Return the tokens [n] of a conversation up to where the model begins to write.

        Args:
            messages: the last is the user's.

        Raises:
            BadRow: if the template refuses them, or a message holds the text of a special token.
        """
        self._check(messages)
        text, spans = self._render(messages, add_generation_prompt=True)
        # Cut as training cuts, so that earlier answers give the same tokens.
        try:
            begins = [parts[0][0] for parts in self._answers(messages, text, spans)]
        except BadRow:
            begins = []  # nothing is learned of such a conversation, but it can be gone on with
        cuts = [0, *begins, len(text)]
        return self._with_bos(np.concatenate(self._encode([text[a:b] for a, b in pairwise(cuts)])))

    def encode_answer(self, text: str) -> Ids:
        """Return the tokens [n] of an answer as the template writes it; the last is `end_id`.

        Raises:
            BadRow: if the answer holds the text of a special token, or the template refuses it.
        """
        messages = (*self._question, Message("assistant", text))
        self._check(messages)
        prompt = self.render(self._question, add_generation_prompt=True)
        written, spans = self._render(messages)
        if not written.startswith(prompt):
            raise BadRow(f"has an answer that {_OTHERWISE}")
        end = self._answers(messages, written, spans)[-1][0][1]
        return self._encode([written[len(prompt) : end]])[0]

    def _try(self) -> tuple[tuple[Message, ...], str]:
        """Return a question that the template takes, and how it writes an answer to it."""
        asked = (Message("user", "a"),)
        failures = []
        for messages in (asked, (Message("system", "c"), *asked)):
            try:
                segments = self.segments((*messages, Message("assistant", "b")))
                return messages, next(text for text, trained in segments if trained)
            except BadRow as error:
                failures.append(str(error))
        raise UserError(f"{self.where} cannot be used: a conversation of one question and answer {failures[0]}")

    def _check(self, messages: Sequence[Message]) -> None:
        if len(messages) > _MAX_TURNS:  # each answer's beginning takes a rendering of all before it
            raise BadRow(f"has more than {_MAX_TURNS:,} turns")
        for number, message in enumerate(messages, 1):
            if found := self._specials.search(message.content):
                raise BadRow(
                    f"holds the text of the special token {found.group()} in turn {number} ({message.role}): "
                    "the model would take it for the token itself"
                )

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, str]]]:
        said = [{"role": message.role, "content": message.content} for message in messages]
        room = MAX_TEXT + 4 * sum(len(message.content) for message in messages)
        environment, pieces = self._environment, []
        environment.restart()
        try:
            for piece in self._template.generate(
                messages=said, add_generation_prompt=add_generation_prompt, **self._variables
            ):
                pieces.append(piece)
                environment.written += len(piece)
                if environment.written > room:
                    raise BadRow("is written by the chat template at more than four times its length")
        except BadRow:
            raise
        except Exception as error:  # a template can fail in any way that Python can
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            reason = kind + next(iter(str(error).splitlines()), "")
            raise BadRow(f"is refused by the chat template ({reason:.200})") from error
        return "".join(pieces), environment.spans

    def _answers(
        self, messages: Sequence[Message], text: str, spans: list[tuple[int, str]]
    ) -> list[list[tuple[int, int]]]:
        """Return for each answer where its parts begin and end; a part ends with an end token.

        There is one part, but where the template marks more.
        """
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        begins = []
        for index in turns:
            prompt = self.render(messages[:index], add_generation_prompt=True)
            begins.append(len(prompt) if text.startswith(prompt) else None)
        if self._marked:
            return self._marked_answers([messages[index].content for index in turns], begins, text, spans)
        answers = []
        for index, begin in zip(turns, begins, strict=True):
            if begin is None:
                raise BadRow(f"has an answer (turn {index + 1}) that {_OTHERWISE}")
            found = self._specials.search(text, begin)
            if found is None:
                raise BadRow(
                    f"has no end behind the answer of turn {index + 1}: the chat template writes none of the "
                    f"tokenizer's special tokens there ({', '.join(list(self.tokenizer.specials)[:8])})"
                )
            written = text[begin : found.start()]
            if not written.rstrip().endswith(messages[index].content.strip()):
                raise BadRow(
                    f"is written by the chat template without the whole answer of turn {index + 1} where the model "
                    f"begins to write (add_generation_prompt): {_MARKS}"
                )
            answers.append([(begin, found.end())])
        return answers

    def _marked_answers(
        self, contents: Sequence[str], begins: Sequence[int | None], text: str, spans: list[tuple[int, str]]
    ) -> list[list[tuple[int, int]]]:
        answers: list[list[tuple[int, int]]] = []
        at = 0
        for start, marked in spans:
            begin, end = max(start, at), start + len(marked)
            if text[start:end] != marked:
                raise BadRow("has an answer that cannot be found: {% generation %} stands in a macro of the template")
            if len(answers) < len(contents) and contents[len(answers)].strip() in marked:
                prompt = begins[len(answers)]
                if prompt is not None and begin < prompt < end:
                    begin = prompt  # the block holds something that the model does not write, such as its own role
                answers.append([])
            if not answers or not text[begin:end].strip():
                continue
            # The block may hold the end token, perhaps with a line end behind it, or stand before it.
            inside = [
                found for found in self._specials.finditer(text, begin, end) if not text[found.end() : end].strip()
            ]
            closing = inside[-1] if inside else self._specials.match(text, end)
            if closing is not None:
                answers[-1].append((begin, closing.end()))
                at = closing.end()
        if len(answers) < len(contents) or not all(answers):
            raise BadRow("has an answer that does not stand whole, with an end token, where {% generation %} marks it")
        return answers

    def _with_bos(self, ids: Ids) -> Ids:
        """Put bos before a conversation whose tokenizer adds it to texts, unless the template has written it."""
        return np.array(self.tokenizer.with_bos(ids.tolist()), np.int32) if self.tokenizer.adds_bos else ids

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the tokens of each text, in which special tokens stand for themselves."""
        cut: list[list[str]] = []
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
        return [np.concatenate([nothing, *(known[piece] for piece in pieces)]) for pieces in cut]


def find_template(name: str | None, tokenizer: Tokenizer, option: str = "chat.template=") -> ChatTemplate:
    """Return a chat template.

    Args:
        name: chatml, llama3, plain, or a file; None: the tokenizer's own.
        tokenizer: what its text is turned into tokens with.
        option: how a person names one, for messages.

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
    """Return the text of a chat template, one that comes with plmtune or a file, and where it is from.

    Raises:
        UserError: if there is none.
    """
    if name in NAMED:
        return NAMED[name], f"The chat template {name}"
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{name} is neither a chat template's name nor a file with one.{did_you_mean(name, NAMED)}")
    try:
        if path.stat().st_size > _MAX_TEMPLATE:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; a chat template has at most {_MAX_TEMPLATE:,}")
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return source, str(path)
