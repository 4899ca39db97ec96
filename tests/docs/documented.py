"""Commands and code of README.md, CONTRIBUTING.md, docs/*.md and the help texts, and a place to run them in.

A command is a line of a block, or an inline code span, that begins with ``plmtune`` (or ``.venv/bin/plmtune``,
``torchrun ... -m plmtune``, a pipe into it). What it needs beyond a fresh checkout is said in a comment of its line:
``# needs: 4 GPUs``, beside an inline span ``<!-- needs: a network -->``. What it leaves to the reader (CHECKPOINT,
FOLDER) is replaced by what `make_place` makes.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_STARTS = re.compile(r"(?:echo .*\| *)?(?:\.venv/bin/)?plmtune\s|torchrun ")
_NEEDS = re.compile(r"(?:#|<!--) (?:[^#]*; )?needs: ([^#<>]+?)\s*(?:-->.*)?$")
_SHELL = ("", "bash", "sh", "console")

# What stands for something of the reader's, and what it is in the place. The first that fits a whole word counts.
PLACEHOLDERS = {
    r"CHECKPOINT|RUN": "runs/demo_sft/latest",
    r"OTHER|some/model/directory": "base",
    r"DIR": "prepared",
    r"FILE": "book.txt",
    r"FOLDER": "tasks",
    r"OUT": "out_of_merge",
    r"TARGET\.\.\.": "base",
    r"CONFIG": "plm_1.8b",
    r"GROUP": "ffn",
    r"(FILE|SmolLM2-135M-Instruct\.Q4_1)\.gguf": "small.gguf",
    r"exports/(FILE|demo_sft-[\d-]+-Q8_0)\.gguf": "exports/export.gguf",
    r"(.*/step-)00000500": r"\g<1>*",
}


@dataclass(frozen=True)
class Command:
    """A line of a document. `text` is for the shell; `words` are what follows ``plmtune``."""

    page: Path
    line: int
    text: str
    inline: bool = False
    needs: str | None = None

    @property
    def words(self) -> list[str]:
        return shlex.split(re.split(r"\bplmtune\s", self.text + " ", maxsplit=1)[1])

    @property
    def is_whole(self) -> bool:
        """Whether it can be run as it stands: not a mention of a command, of its usage, or of a part of it."""
        if not self.inline:
            return "..." not in self.text
        name = 2 if self.words[0] in ("data", "tokenizer") else 1
        named = any(not word.startswith("-") for word in self.words[name:])
        return (named or self.words[0] in ("ls", "runs")) and not re.search(
            r"\.\.\.|(?<![\w-])[A-Z_]{2,}\b", " ".join(self.words[name:])
        )

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Code:
    """A block of another language."""

    page: Path
    line: int
    language: str
    text: str


def _blocks(page: Path) -> Iterator[Code]:
    """Fenced and indented blocks; the language of an indented one is empty."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fence: str | None = None
    start, held = 0, []
    for number, line in enumerate([*lines, ""], 1):
        marker = re.match(r" *```(\w*)", line)
        if fence is not None:
            if marker:
                yield Code(page, start, fence, "\n".join(held))
                fence, held = None, []
            else:
                held.append(line)
        elif marker:
            fence, start, held = marker[1], number + 1, []
        elif line.startswith("    "):
            start = start if held else number
            held.append(line[4:])
        elif held:
            yield Code(page, start, "", "\n".join(held))
            held = []


def _cut(line: str) -> str:
    """A command without its comment."""
    for found in re.finditer(r"\s+#\s", line):
        before = line[: found.start()]
        if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
            return before.strip()
    return line.strip()


def _needs(line: str) -> str | None:
    found = _NEEDS.search(line)
    return found[1] if found else None


def _optional(text: str) -> str:
    """``[DIR]`` may be left out."""
    return re.sub(r"\s\[[\w.= -]+\](?=\s|$)", "", text)


def commands(page: Path) -> list[Command]:
    """Every command of a page, in order."""
    found = []
    for block in _blocks(page):
        if block.language not in _SHELL:
            continue
        lines = block.text.split("\n")
        for index, line in enumerate(lines):
            if not _STARTS.match(line):
                continue
            whole = line
            for further in lines[index + 1 :]:
                if not whole.endswith("\\"):
                    break
                whole = whole[:-1].rstrip() + " " + further.strip()
            found.append(Command(page, block.line + index, _optional(_cut(whole)), needs=_needs(whole)))
    text = page.read_text(encoding="utf-8")
    lines = text.splitlines()
    for span in re.finditer(r"`(plmtune [^`\n]+(?:\n[^`\n]+)?)`", text):  # perhaps over the end of a line
        first, last = text.count("\n", 0, span.start()), text.count("\n", 0, span.end())
        if not lines[first].startswith("    "):
            words = " ".join(span[1].split())
            needs = "the reader's files" if lines[first].startswith("|") else _needs(lines[last])  # a row maps terms
            found.append(Command(page, first + 1, _optional(words), True, needs))
    return sorted(found, key=lambda command: command.line)


def help_commands() -> list[Command]:
    """The examples in the help texts: lines of a paragraph that click does not wrap."""
    found = []
    for path in sorted((ROOT / "plmtune" / "cli").glob("*.py")):
        shown = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            shown = line.strip() == "\\b" or (shown and bool(line.strip()))
            if shown and _STARTS.match(line.strip()):
                text = re.split(r"\s{2,}(?=\w)|, plmtune", _cut(line.strip().replace("\\\\", "\\")))[0]
                found.append(Command(path, number, _optional(text)))
    return found


def code(language: str) -> list[Code]:
    """Every block of a language; Python's include the prompts of an interactive session and indented imports."""
    found = []
    for page in PAGES:
        for block in _blocks(page):
            text = block.text
            if language == "python" and block.language == "" and ">>> " in text:
                text = "\n".join(re.findall(r"^(?:>>> |\.\.\. )(.*)", text, re.MULTILINE))
            elif block.language != language and not (language == "python" and text.startswith(("import ", "from "))):
                continue
            found.append(Code(block.page, block.line, language, text))
    return found


def placed(words: list[str]) -> list[str]:
    """Words with the reader's own replaced; dots that stand for more are left out."""
    out = []
    for word in words:
        if word == "..." or word.endswith("=..."):
            continue
        key, equals, value = word.rpartition("=") if re.fullmatch(r"[\w.]+=[A-Z_/.a-z]+", word) else ("", "", word)
        for pattern, new in PLACEHOLDERS.items():
            if found := re.fullmatch(pattern, value):
                value = found.expand(new)
                break
        out.append(f"{key}{equals}{value}")
    return out


def own_file(page: Path) -> str:
    """What mine.yaml holds where a page has one; else a few keys."""
    for block in _blocks(page):
        if block.language == "yaml" and block.text.startswith("# mine.yaml"):
            return block.text + "\n"
    return "recipe: pretrain\ndata: {paths: [my_text]}\nphases: [{name: main, tokens: 2M}]\n"


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_place(place: Path) -> None:
    """Make the files that the documents speak of as the reader's own: this repository's text, questions on Python."""
    import pyarrow

    for folder in ("my_text", "corpus", "wiki", "evaluations", "exports", "tasks", "out"):
        (place / folder).mkdir(exist_ok=True)
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    for index, text in enumerate(pages):
        (place / "my_text" / f"{index:02}.txt").write_text(text, encoding="utf-8")
        (place / "corpus" / f"{index:02}.txt").write_text(text, encoding="utf-8")
    for name in ("book.txt", "notes.txt"):
        (place / name).write_text(pages[0], encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "plmtune").glob("*.py"))]
    _write(place / "rows.jsonl", [{"text": text, "content": text[:2000]} for text in pages + sources])
    for name in ("dump.jsonl.zst", "wiki/a.jsonl.zst"):
        with pyarrow.CompressedOutputStream(str(place / name), "zstd") as packed:
            packed.write((place / "rows.jsonl").read_bytes())

    documented = [(name, inspect.getdoc(getattr(shutil, name)) or "") for name in shutil.__all__]
    asked = [(f"What does shutil.{name} do?", text.partition("\n\n")[0]) for name, text in documented if text]
    for name in ("chats.jsonl", "dolly.jsonl"):
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in asked]
        _write(place / name, [{"messages": messages} for messages in turns])
    others = [answer for _, answer in asked[1:] + asked[:1]]
    pairs = [{"prompt": q, "chosen": a, "rejected": b} for (q, a), b in zip(asked, others, strict=True)]
    _write(place / "pairs.jsonl", pairs)
    sums: list[dict[str, object]] = [
        {"question": f"What is {n} plus {n}?", "answer": f"{n} plus {n} is {2 * n}.\n#### {2 * n}"} for n in range(40)
    ]
    for name in ("gsm8k_train.jsonl", "tasks/gsm8k_train.jsonl", "tasks/gsm8k_test.jsonl"):
        _write(place / name, sums)
    problem = {
        "task_id": "T/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    _write(place / "tasks" / "HumanEval.jsonl", [problem] * 4)
    choices = {"query": "Question: Which of these is a number?", "choices": ["one", "path", "file", "stack"], "gold": 0}
    _write(place / "tasks" / "foundry_arc_easy.jsonl", [choices] * 8)
    (place / "my_map.yaml").write_text("gsm8k:\n  test: tasks/gsm8k_test.jsonl\n  train: tasks/gsm8k_train.jsonl\n")
    (place / "my_parts.py").write_text(
        "from plmtune.modules.feed_forward import SwiGLU\nfrom plmtune.registry import register\n\n\n"
        '@register("ffn", "my_ffn")\ndef my_ffn(embed_dim: int, *, hidden_dim: int = 64) -> SwiGLU:\n'
        '    """A gate."""\n    return SwiGLU(embed_dim, hidden_dim=hidden_dim)\n'
    )
    (place / "mine.yaml").write_text(own_file(ROOT / "README.md"))
