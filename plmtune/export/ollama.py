"""Ollama's Modelfile of a GGUF file: the chat template as a Go template, ends of answers, sampling.

A Jinja template is not translated but observed: it renders conversations of known contents, and what it writes around
them is written as a Go template. Conversations of other lengths must then come out the same, or there is no TEMPLATE.
Ollama puts bos before a prompt itself, joins neighbouring messages of one role, and gives all system messages together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plmtune.errors import UserError
from plmtune.export import probe_texts
from plmtune.export.huggingface import end_ids, read_generation
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.tokenizer import Tokenizer

_BASE = "{{ .Prompt }}"
_IRREGULAR = "What the chat template writes around a message depends on more than its role and place"
_YEAR = re.compile(r"20\d\d")
_SYSTEM, *_TURNS = ("qsystemq", "qfirstq", "qsecondq", "qthirdq", "qfourthq", "qfifthq")
# Ollama's parameter of each key of generation_config.json.
_SAMPLING = {
    **{key: key for key in ("temperature", "top_k", "top_p", "min_p", "typical_p")},
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class Form:
    """What a chat template writes around contents.

    Attributes:
        first: before the first content, without a system message.
        system: its place: in front, before the user's last content, or nowhere.
        before_system: before a system message in front, in the place of `first`.
        after_system: behind a system message.
        to_answer: between a user's content and the answer.
        to_user: between an answer and the next user's content.
        prompt: behind the last content, where the model writes its answer.
    """

    first: str
    system: Literal["front", "last", "nowhere"]
    before_system: str
    after_system: str
    to_answer: str
    to_user: str
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that ends with the user's turn."""
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        turns = [message for message in messages if message.role != "system"]
        front = system and self.system == "front"
        out = [f"{self.before_system}{system}{self.after_system}" if front else self.first]
        for number, message in enumerate(turns, 1):
            last = number == len(turns)
            if message.role == "user":
                out += [system, self.after_system] if last and system and self.system == "last" else []
                out += [message.content, self.prompt if last else self.to_answer]
            else:
                out += [message.content, "" if last else self.to_user]
        return "".join(out)

    def go(self) -> str:
        """Return the same as a Go template of Ollama."""
        last, head, system = "{{ $last := eq (len (slice $.Messages $i)) 1 }}", _go(self.first), ""
        if self.system == "front":
            both = f"{_go(self.before_system)}{{{{ .System }}}}{_go(self.after_system)}"
            head = f"{{{{ if .System }}}}{both}{{{{ else }}}}{head}{{{{ end }}}}"
        elif self.system == "last":
            system = f"{{{{ if and $last $.System }}}}{{{{ $.System }}}}{_go(self.after_system)}{{{{ end }}}}"
        behind = _go(self.to_answer)
        if self.prompt != self.to_answer:
            behind = f"{{{{ if $last }}}}{_go(self.prompt)}{{{{ else }}}}{behind}{{{{ end }}}}"
        loop = f"{{{{ range $i, $_ := .Messages }}}}{last}"
        user = f'{{{{ if eq .Role "user" }}}}{system}{{{{ .Content }}}}{behind}'
        answer = '{{ else if eq .Role "assistant" }}{{ .Content }}{{ if not $last }}'
        return f"{head}{loop}{user}{answer}{_go(self.to_user)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"


def modelfile(gguf: str, tokenizer: Tokenizer, source: Path) -> tuple[str, list[str]]:
    """Return a Modelfile, and notes for the user.

    Args:
        gguf: name of the file, which lies beside.
        source: the checkpoint's directory, whose generation_config.json has the sampling.
    """
    template, notes = go_template(tokenizer)
    lines = [f"FROM ./{gguf}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    texts = {identity: text for text, identity in tokenizer.specials.items()}
    stops = [texts.get(identity) or tokenizer.decode([identity]) for identity in end_ids(tokenizer)]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if stop]
    lines += [f"PARAMETER {key} {value}" for key, value in sampling(read_generation(source)).items()]
    return "\n".join(lines) + "\n", notes


def sampling(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return Ollama's parameters for a generation_config.json."""
    if not settings.get("do_sample"):  # greedy, as in transformers, where the file says so
        return {"temperature": 0} if settings.get("do_sample") is False else {}
    values = {key: settings.get(key) for key in _SAMPLING}
    return {
        _SAMPLING[key]: value for key, value in values.items() if isinstance(value, int | float) and value is not True
    }


def go_template(tokenizer: Tokenizer) -> tuple[str | None, list[str]]:
    """Return the Go template of a tokenizer's chat template, and notes; None: there is none that writes the same."""
    if tokenizer.chat_template is None:
        return _BASE, []
    try:
        template = ChatTemplate(tokenizer.chat_template, tokenizer, "The chat template")
    except UserError as error:
        return None, [_without(str(error).rstrip("."))]
    bos = tokenizer.bos if tokenizer.adds_bos and tokenizer.bos else ""

    def render(messages: Sequence[Message]) -> str:
        return template.render(messages, add_generation_prompt=True).removeprefix(bos)

    form, notes = _observed(render)
    if form is None:
        return None, [_without(_IRREGULAR)]
    strict = [
        tuple(Message(message.role, f"a{number}.") for number, message in enumerate(messages))
        for messages in _CONVERSATIONS
    ]
    if wrong := _first_other(form, render, strict):
        return None, [_without(f"A Go template writes {form.render(wrong)!r:.80} for {render(wrong)!r:.80}")]
    if '"""' in (found := form.go()):
        return None, [_without('The chat template writes """, which a Modelfile cannot hold')]
    if _first_other(form, render, probe_texts.CONVERSATIONS):
        notes.append("The chat template strips white space around a message, Ollama's template does not.")
    if _first_other(form, render, [_THOUGHTS]):
        notes.append("The chat template leaves thoughts out of earlier answers, Ollama's template does not.")
    if "strftime_now" in template.source and _YEAR.search(form.first + form.before_system + form.after_system):
        notes.append("The chat template writes the day. Ollama's has one day for always, which plmtune trains with.")
    return found, notes


def _without(cause: str) -> str:
    return (
        f"{cause}: the Modelfile has no TEMPLATE. Ollama then takes a nearly equal one that it knows, or in newer "
        "versions the file's own."
    )


_THOUGHTS = (Message("user", "a"), Message("assistant", "<think>\nb\n</think>\n\nc"), Message("user", "d"))
_CONVERSATIONS = [
    *probe_texts.CONVERSATIONS,
    tuple(Message(role, "") for role in (*["user", "assistant"] * 3, "user")),
    tuple(Message(role, "") for role in ("system", *["user", "assistant"] * 3, "user")),
]


def _first_other(form: Form, render: Any, conversations: Sequence[Sequence[Message]]) -> Sequence[Message] | None:
    """The first conversation that comes out otherwise; the template may refuse some, as system messages."""
    for messages in conversations:
        try:
            wanted = render(messages)
        except BadRow:
            continue
        if form.render(messages) != wanted:
            return messages
    return None


def _observed(render: Any) -> tuple[Form | None, list[str]]:
    """What a template writes around the contents of conversations, and notes; None: it is not always the same."""

    def around(*contents: str) -> list[str] | None:
        roles = ["user" if number % 2 == 0 else "assistant" for number in range(5)]
        turns = [Message("system", _SYSTEM)] if contents[0] == _SYSTEM else []
        turns += [Message(role, text) for role, text in zip(roles, contents[len(turns) :], strict=False)]
        return _between(render(turns), contents)

    try:
        once, more = around(*_TURNS[:1]), around(*_TURNS[:3])
    except BadRow:
        return None, []
    if once is None or more is None:
        return None, []
    (first, prompt), (_, to_answer, to_user, _) = once, more
    try:
        system, later = around(_SYSTEM, *_TURNS[:1]), around(_SYSTEM, *_TURNS[:3])
    except BadRow:
        note = "The chat template takes no system message. Ollama's puts one before the first message of the user."
        return Form(first, "front", first, "\n\n", to_answer, to_user, prompt), [note]
    if system is not None:
        place: Literal["front", "last"] = "last" if later is None else "front"
        return Form(first, place, system[0], system[1], to_answer, to_user, prompt), []
    note = "The chat template leaves out system messages, and so does Ollama's."
    return Form(first, "nowhere", "", "", to_answer, to_user, prompt), [note]


def _between(text: str, contents: Sequence[str]) -> list[str] | None:
    """The parts of a text before, between and behind contents; None: they are not there once each, in this order."""
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        parts.append(before)
    return [*parts, text]


def _go(text: str) -> str:
    """A text in a Go template and in a Modelfile, which leaves out what is not printable."""
    out = []
    for char in text.replace("{{", "\0"):
        if char == "\0":
            out.append('{{ "{{" }}')
        elif char.isprintable() or char in "\n\t":
            out.append(char)
        else:
            code = f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"
            out.append(f'{{{{ "{code}" }}}}')
    return "".join(out)


def _quoted(text: str) -> str:
    quotes = '"""' if '"' in text else '"'
    return f"{quotes}{text}{quotes}"
