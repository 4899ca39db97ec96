"""Where in the text of a conversation its answers stand: what the model writes, each with its end token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.rendering import Renderer, Spans, holds, renamed_turn

MARKS = "mark what the model writes with {% generation %} ... {% endgeneration %} in the template"
OTHERWISE = f"the chat template writes otherwise than where the model is to write it (add_generation_prompt): {MARKS}"
_OTHER = "\u2047plmtune\u2047"  # an answer that nobody gives
Parts = list[tuple[int, int]]


class Answers:
    """Finds answers: by the template's marks, by its generation prompts, or by comparing what it writes."""

    def __init__(self, renderer: Renderer, specials: re.Pattern[str], names: Sequence[str]) -> None:
        """Take a template and the special tokens, as a pattern and by name."""
        self._renderer = renderer
        self._specials = specials
        self._names = names

    def find(
        self, messages: Sequence[Message], text: str, spans: Spans, add_generation_prompt: bool = False
    ) -> tuple[list[Parts], list[str]]:
        """Return for each answer where its parts begin and end, and names for what the template leaves out of them.

        The last part ends with an end token. There is one part, but where the template marks more.

        Args:
            messages: as `Renderer.honoured` gives them.
            text, spans: what the template writes of them.

        Raises:
            BadRow: if the text does not show where an answer begins or ends, or does not hold it.
        """
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        begins: list[int | None] = []
        for index in turns:
            prompt = self._renderer.tried(messages[:index], add_generation_prompt=True)
            begins.append(len(prompt) if prompt is not None and text.startswith(prompt) else None)
        if self._renderer.marked:
            return self._marked([messages[index].content for index in turns], begins, text, spans), []
        answers: list[Parts] = []
        names: list[str] = []
        for index, begin in zip(turns, begins, strict=True):
            span = self._plain(messages[index], begin, text)
            if span is None:
                after = answers[-1][-1][1] if answers else 0
                span = self._compared(messages, index, begin, after, text, add_generation_prompt)
                if not holds(text[slice(*span)], messages[index].content):
                    whole = self._renderer.tried(messages[: index + 1])
                    if whole is None or not holds(whole, messages[index].content):
                        raise BadRow(_not_whole(index))
                    names = ["thoughts of earlier turns"]
            answers.append([span])
        return answers, names

    def _plain(self, message: Message, begin: int | None, text: str) -> tuple[int, int] | None:
        """Return where an answer that is nothing but a text stands behind its prompt; None: it does not."""
        if begin is None or message.more:
            return None
        found = self._specials.search(text, begin)
        if found is None or not text[begin : found.start()].rstrip().endswith(message.content.strip()):
            return None
        return begin, found.end()

    def _compared(
        self,
        messages: Sequence[Message],
        index: int,
        begin: int | None,
        after: int,
        text: str,
        add_generation_prompt: bool,
    ) -> tuple[int, int]:
        """Find an answer by comparing the text with that of another answer in its place.

        Args:
            index: of its message.
            begin: where its prompt ends, if that is how the text begins.
            after: where the answer before ended.
        """
        tried = self._renderer.tried

        def replaced(by: Message) -> str | None:
            return tried([*messages[:index], by, *messages[index + 1 :]], add_generation_prompt)

        plain = replaced(Message("assistant", _OTHER))
        # Without the call, what a tool gave back may be refused: then another call stands there.
        other = replaced(renamed_turn(messages[index], _OTHER)) if plain is None else plain
        before, prompt = tried(messages[:index]) or "", tried(messages[:index], add_generation_prompt=True) or ""
        header = prompt[_common(prompt, before) :]
        differs = None if other is None or other == text else _common(text, other)
        if begin is None:
            at = text.rfind(header, after, differs) if header and differs is not None else -1
            if differs is None or differs < after or (at < 0 and plain is None):
                raise BadRow(f"has an answer (turn {index + 1}) that {OTHERWISE}")
            begin = differs if at < 0 else at + len(header)
        elif not header and plain is not None and self._specials.search(text, begin, _common(text, plain)):
            raise BadRow(_not_whole(index))  # what begins the turn is no part of the prompt, and no answer
        end = self._end(tried(messages[: index + 1]), begin, text, None if differs is None else other)
        if end is None:
            raise BadRow(
                f"has no end behind the answer of turn {index + 1}: the chat template writes none of the "
                f"tokenizer's special tokens there ({', '.join(self._names[:8])})"
            )
        later = [renamed_turn(message, f"{_OTHER}{message.role}") for message in messages[index + 1 :]]
        if (tried([*messages[: index + 1], *later], add_generation_prompt) or text)[begin:end] != text[begin:end]:
            raise BadRow(f"has an answer (turn {index + 1}) in which the chat template writes a later turn")
        return begin, end

    def _end(self, through: str | None, begin: int, text: str, other: str | None) -> int | None:
        """Return where an answer ends: with the text of all up to it, or where another answer in its place ends."""
        if through is not None and len(through) > begin and text.startswith(through):
            ends = list(self._specials.finditer(text, begin, len(through)))
            if ends and not text[ends[-1].end() : len(through)].strip():
                return ends[-1].end()
        if other is None:
            return None
        same = _common(text[::-1], other[::-1])
        return next((m.end() for m in self._specials.finditer(text, begin) if m.end() > len(text) - same), None)

    def _marked(self, contents: Sequence[str], begins: Sequence[int | None], text: str, spans: Spans) -> list[Parts]:
        answers: list[Parts] = []
        ended: list[bool] = []  # of each answer, whether its last part has an end token
        at = 0
        one_each = sum(bool(marked.strip()) for _, marked in spans) == len(contents)
        for start, marked in spans:
            begin, end = max(start, at), start + len(marked)
            if text[start:end] != marked:
                raise BadRow("has an answer that cannot be found: {% generation %} stands in a macro of the template")
            if None not in begins:  # a block belongs to the turn whose prompt ends before its end
                turn = sum(prompt is not None and prompt < end for prompt in begins)
                opened = turn > len(answers)
                answers += [[] for _ in range(turn - len(answers))]
            elif opened := len(answers) < len(contents) and (
                (one_each and bool(marked.strip()) and holds(marked, _said(contents[len(answers)])))
                or contents[len(answers)].strip() in marked
            ):
                answers.append([])
            if opened and (prompt := begins[len(answers) - 1]) is not None and begin < prompt < end:
                begin = prompt  # the block holds something that the model does not write, such as its own role
            if not answers or not text[begin:end].strip():
                continue
            # The block may hold the end token, perhaps with a line end behind it, or stand before it.
            inside = [
                found for found in self._specials.finditer(text, begin, end) if not text[found.end() : end].strip()
            ]
            closing = inside[-1] if inside else self._specials.match(text, end)
            at = end if closing is None else closing.end()
            answers[-1].append((begin, at))
            ended = [*ended[: len(answers) - 1], closing is not None]
        whole = (
            bool(parts) and holds("".join(text[begin:end] for begin, end in parts), _said(said))
            for said, parts in zip(contents, answers, strict=False)
        )
        if len(answers) < len(contents) or not all(whole) or not all(ended):
            raise BadRow("has an answer that does not stand whole, with an end token, where {% generation %} marks it")
        return answers


def _said(content: str) -> str:
    """What an answer says behind its thoughts, which templates write apart."""
    return content.rpartition("</think>")[2]


def _not_whole(index: int) -> str:
    return (
        f"is written by the chat template without the whole answer of turn {index + 1} where the model begins to write "
        f"(add_generation_prompt): {MARKS}"
    )


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
