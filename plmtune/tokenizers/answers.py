"""Finds the answers in the text of a conversation, each with its end token."""

from __future__ import annotations

import re
from collections.abc import Sequence

from plmtune.tokenizers.message import BadRow, Message
from plmtune.tokenizers.rendering import Renderer, Spans, holds, renamed_turn

MARKS = "mark answers with {% generation %} ... {% endgeneration %} in the template"
OTHERWISE = f"the chat template does not write after the generation prompt (add_generation_prompt): {MARKS}"
_OTHER = "\u2047plmtune\u2047"  # an answer that no data has
Parts = list[tuple[int, int]]


class Answers:
    """Finds answers by the template's marks, by its generation prompts, or by comparing renderings."""

    def __init__(self, renderer: Renderer, specials: re.Pattern[str], names: Sequence[str]) -> None:
        self._renderer = renderer
        self._specials = specials
        self._names = names

    def find(
        self, messages: Sequence[Message], text: str, spans: Spans, add_generation_prompt: bool = False
    ) -> tuple[list[Parts], list[str]]:
        """Return the begin and end of each answer's parts, and names for content that the template leaves out of them.

        The last part ends with an end token. An answer has one part, unless the template marks more.

        Args:
            messages: from `Renderer.honoured`.
            text, spans: their rendering.

        Raises:
            BadRow: if the text does not show where an answer begins or ends, or does not contain it.
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
        """Return the place of an answer that is plain text after its prompt; None: it is not."""
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
        """Find an answer by comparing the text with a rendering of another answer in its place.

        Args:
            index: of its message.
            begin: the end of its prompt, if the text begins with it.
            after: the end of the previous answer.
        """
        tried = self._renderer.tried

        def replaced(by: Message) -> str | None:
            return tried([*messages[:index], by, *messages[index + 1 :]], add_generation_prompt)

        plain = replaced(Message("assistant", _OTHER))
        # Without the call the template may refuse the tool's result: replace the call by another.
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
            raise BadRow(_not_whole(index))  # text between the prompt and the answer
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
        """Return the end of an answer: that of the rendering up to it, or that of another answer in its place."""
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
        ended: list[bool] = []  # whether the last part of each answer has an end token
        at = 0
        one_each = sum(bool(marked.strip()) for _, marked in spans) == len(contents)
        for start, marked in spans:
            begin, end = max(start, at), start + len(marked)
            if text[start:end] != marked:
                raise BadRow("has an answer that cannot be found: {% generation %} stands in a macro of the template")
            if None not in begins:  # a block belongs to the last turn whose prompt ends before it
                turn = sum(prompt is not None and prompt < end for prompt in begins)
                opened = turn > len(answers)
                answers += [[] for _ in range(turn - len(answers))]
            elif opened := len(answers) < len(contents) and (
                (one_each and bool(marked.strip()) and holds(marked, _said(contents[len(answers)])))
                or contents[len(answers)].strip() in marked
            ):
                answers.append([])
            if opened and (prompt := begins[len(answers) - 1]) is not None and begin < prompt < end:
                begin = prompt  # the block contains text that the model does not write, such as its role
            if not answers or not text[begin:end].strip():
                continue
            # The end token may be in the block, perhaps followed by a line end, or right after it.
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
    """Return an answer without its thoughts, which templates write separately."""
    return content.rpartition("</think>")[2]


def _not_whole(index: int) -> str:
    return (
        f"is written by the chat template without the whole answer of turn {index + 1} after the generation prompt "
        f"(add_generation_prompt): {MARKS}"
    )


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
