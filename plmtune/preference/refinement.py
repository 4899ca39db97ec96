"""Refinement prompts: T(x, y) of ARIES (arXiv 2502.05605), the question with an earlier answer to improve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from jinja2 import StrictUndefined, Template, TemplateError, meta
from numpy.typing import NDArray

from plmtune.data.examples import Collected, Grouped
from plmtune.data.packing import Example
from plmtune.data.preferences import Preferences
from plmtune.errors import UserError
from plmtune.tokenizers.chat_template import ChatTemplate
from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.template_limits import TemplateLimit
from plmtune.tokenizers.template_sandbox import MAX_TEMPLATE, Sandbox

_BUILTIN = Path(__file__).with_name("refinement.jinja")
UNSHOWN = "has an answer with calls of tools or thoughts, which a refinement prompt, made of its text, does not show"
_VARIABLES = {"prompt", "answer"}


@dataclass(frozen=True)
class Refinement:
    """A Jinja template of the two variables `prompt`, the last user message, and `answer`, what was answered to it.

    where: its file, for messages.
    """

    source: str
    where: str

    def __post_init__(self) -> None:
        try:
            used = meta.find_undeclared_variables(self._environment.parse(self.source))
        except TemplateError as error:
            raise UserError(f"{self.where} is no Jinja template: {error}") from error
        if used != _VARIABLES:
            missing, unknown = sorted(_VARIABLES - used), sorted(used - _VARIABLES)
            wrong = [f"does not use {' and '.join(missing)}"] if missing else []
            wrong += [f"uses {', '.join(unknown)}, which is undefined"] if unknown else []
            raise UserError(
                f"{self.where} {', and '.join(wrong)}. A refinement template has two variables: "
                "prompt (the question) and answer (the one to improve)"
            )
        self._render("What is 2 + 3?", "6")

    @cached_property
    def _environment(self) -> Sandbox:
        environment = Sandbox()
        environment.undefined = StrictUndefined
        return environment

    @property
    def fingerprint(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.source.encode())

    @cached_property
    def _template(self) -> Template:
        return self._environment.from_string(self.source)

    def _render(self, prompt: str, answer: str) -> str:
        self._environment.restart(length=len(prompt) + len(answer))
        try:
            text = self._template.render(prompt=prompt, answer=answer)
        except TemplateLimit as error:
            raise UserError(f"{self.where} {error}") from error
        except Exception as error:  # whatever a template does: undefined names, arithmetic, forbidden attributes
            raise UserError(f"{self.where} fails: {type(error).__name__}: {error}") from error
        if not text.strip():
            raise UserError(f"{self.where} writes nothing for a prompt of {len(prompt):,} characters")
        return text

    def fill(self, prompt: Sequence[Message], answer: str) -> tuple[Message, ...]:
        """Return T(x, y): the prompt, its last user message replaced by the template filled with it and the answer."""
        if prompt[-1].role != "user":
            raise BadRow(f"has a prompt that ends in a {prompt[-1].role}'s message, while a refinement asks a user's")
        return (*prompt[:-1], Message("user", self._render(prompt[-1].content, answer)))

    def encode(
        self, template: ChatTemplate, prompt: Sequence[Message], answer: str, *, max_len: int
    ) -> tuple[NDArray[np.int32], bool] | None:
        """Return the ids of T(x, y) and whether the answer was cut from its end to make them fit into max_len.

        None: there is no room for any of the answer.
        """
        ids = template.encode_prompt(self.fill(prompt, answer))
        if ids.size <= max_len:
            return ids, False
        held = template.tokenizer.encode(answer)
        while ids.size > max_len:
            # What is cut may join with what follows into other tokens, hence not at once.
            held = held[: max(0, len(held) - (ids.size - max_len))]
            shorter = template.tokenizer.decode(held).rstrip("\ufffd")  # half a character at the cut
            if not shorter.strip():
                return None
            ids = template.encode_prompt(self.fill(prompt, shorter))
        return ids, True


def find_refinement(template: str | None) -> Refinement:
    """Read a Jinja file; None: the built-in template, whose words are ours, as the paper's are not public."""
    path = _BUILTIN if template is None else Path(template).expanduser()
    key = f"refinement.template={template}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE + 1)
        if len(data) > MAX_TEMPLATE:
            raise UserError(f"{key}: has more than {MAX_TEMPLATE:,} bytes, which is no template")
        source = data.decode("utf-8")
    except OSError as error:
        why = f"cannot be read ({error.strerror or error}). Name a Jinja file, or null for the built-in template"
        raise UserError(f"{key}: {why}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: is not UTF-8 at byte {error.start}") from error
    return Refinement(source, "the built-in refinement template" if template is None else str(path))


def encode_pairs(source: Preferences, collected: Collected, *, refinement: Refinement) -> Iterator[Grouped]:
    """Make of each pair the two conversations of ARIES's first stage (arXiv 2502.05605).

    The chosen answer follows the prompt, and it follows the refinement prompt with the rejected answer, which is
    shortened where both do not fit into seq_len. Pairs of one prompt are a group. Prompts are not trained, nor are
    the answers in them, whatever `train_on` says.
    """
    template, seq_len = collected.template, collected.seq_len
    for pair in source.pairs(skip_bad=True):
        chosen = pair.answer("chosen")
        if chosen is None or pair.rejected is None:
            source.refused.add(pair.place, "has one answer only, and refining takes two")
            continue
        try:
            if not pair.shows_all:
                raise BadRow(UNSHOWN)
            prompt = template.encode_prompt(pair.prompt, collected.unused)
            answer = template.encode_answer(chosen, collected.unused)
            # The answer in the prompt is shortened: cut from the right, a long question would lose the trained answer.
            context = refinement.encode(template, pair.prompt, pair.rejected, max_len=seq_len - answer.size)
        except BadRow as error:
            collected.refused.add(pair.place, error)
            continue
        prompts = [prompt]
        if context is None:
            collected.left_out.add(
                pair.place, f"leaves no room in seq_len ({seq_len:,}) for an earlier answer to refine"
            )
        else:
            prompts.append(context[0])
            collected.shortened += context[1]
        examples = [
            Example(np.concatenate([ids, answer]), np.arange(ids.size + answer.size) >= ids.size, pair.place)
            for ids in prompts
        ]
        said = repr([(message.role, message.content) for message in pair.prompt])
        group = xxhash.xxh3_128_digest(said.encode("utf-8", "surrogatepass"))
        for example in collected.fit(examples):
            yield example, group
