"""Commands and code of README.md, docs/*.md and the help texts, and a place in which they can be run.

A command is a line of a block that begins with ``plmtune`` (or ``.venv/bin/plmtune``, ``torchrun ... -m plmtune``, a
pipe into it), or an inline code span that does. What such a line leaves to the reader (CHECKPOINT, FOLDER, RUN) is
replaced by what `make_place` makes.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_STARTS = re.compile(r"(?:echo .*\| *)?(?:\.venv/bin/)?plmtune\s|torchrun .*|python benchmarks/")
_SHELL = ("", "bash", "sh", "console")

# What stands for something of the reader's, and what it is in the place. The first that fits a whole word counts.
PLACEHOLDERS = {
    r"(CHECKPOINT|RUN|RUN_DIR|EXPORT)": "runs/demo_sft/latest",
    r"RUN/rounds/01/chains\.jsonl": "runs/demo_aries/latest/rounds/01/chains.jsonl",
    r"(OTHER|some/model/directory)": "base",
    r"(DIR|runs/data/[\w-]+)": "prepared",
    r"FILE": "book.txt",
    r"(FOLDER|eval\.data=FOLDER)": "tasks",
    r"(OUT|merged)": "out_of_merge",
    r"TARGET\.\.\.": "base",
    r"CONFIG": "plm_1.8b",
    r"GROUP": "ffn",
    r"(FILE|SmolLM2-135M-Instruct\.Q4_1)\.gguf": "small.gguf",
    r"exports/[\w.-]+\.gguf": "exports/export.gguf",
    r"(evaluations/(base|RESULT|sft)|A)\.json": "results/a.json",
    r"(evaluations/tuned|B)\.json": "results/b.json",
    r".*/step-00000500": "base",
}


@dataclass(frozen=True)
class Command:
    """A line of a document. `text` is for the shell; `words` are what follows ``plmtune``."""

    page: Path
    line: int
    text: str
    inline: bool = False

    @property
    def words(self) -> list[str]:
        return shlex.split(re.split(r"\bplmtune\s", self.text + " ", maxsplit=1)[1])

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
    """A command without its comment, or the words that stand behind it in a column."""
    for found in re.finditer(r"\s+#\s|\s{3,}(?=\w)", line):
        before = line[: found.start()]
        if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
            return before.strip()
    return line.strip()


def _optional(text: str) -> str:
    """``[--dtype bf16]`` is an option that exists; ``[DIR]`` may be left out."""
    text = re.sub(r"(?<=\s)\[(--[^\]]*)\]", r"\1", text)
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
            text = _optional(_cut(whole))
            if "plmtune" in text.replace("plmtune/", ""):
                found.append(Command(page, block.line + index, text))
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("    "):
            found += [Command(page, number, _optional(span), True) for span in re.findall(r"`(plmtune [^`]+)`", line)]
    return sorted(found, key=lambda command: command.line)


def help_commands() -> list[Command]:
    """The examples in the help texts: lines of a paragraph that click does not wrap."""
    found = []
    for path in sorted((ROOT / "plmtune" / "cli").glob("*.py")):
        shown = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            shown = line.strip() == "\\b" or (shown and bool(line.strip()))
            if shown and _STARTS.match(line.strip()):
                text = re.split(r"\s+then: |, plmtune", _cut(line.strip().replace("\\\\", "\\")))[0]
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
        known = next((new for pattern, new in PLACEHOLDERS.items() if re.fullmatch(pattern, value)), value)
        out.append(f"{key}{equals}{known}")
    return out


def own_file(page: Path) -> str:
    """What mine.yaml holds where a page has one; else a few keys."""
    for block in _blocks(page):
        if block.language == "yaml" and block.text.startswith("# mine.yaml"):
            return block.text + "\n"
        if block.language == "yaml" and block.text.startswith("data:"):  # its page says which choice goes with it
            return f"defaults: [override /data: mix]\n{block.text}\n"
    return "recipe: pretrain\ndata: {paths: [my_text]}\nphases: [{name: main, tokens: 2M}]\n"


def make_place(place: Path) -> None:
    """Make the files that the documents speak of as the reader's own."""
    import zstandard

    sentence = "The path is a file, and the file has the number {}. A stack is a list that is used from one end.\n"
    for folder in ("my_text", "corpus", "wiki", "evaluations", "results", "exports", "tasks"):
        (place / folder).mkdir()
    for index in range(40):
        text = "".join(sentence.format(index * 40 + line) for line in range(40))
        (place / "my_text" / f"{index:02}.txt").write_text(text)
        (place / "corpus" / f"{index:02}.txt").write_text(text)
    page = "".join(sentence.format(index) for index in range(200))
    for name in ("book.txt", "notes.txt"):
        (place / name).write_text(page)
    contents = [json.dumps({"text": sentence.format(index), "content": page}) for index in range(20)]
    (place / "rows.jsonl").write_text("\n".join(contents))
    for name in ("dump.jsonl.zst", "wiki/a.jsonl.zst"):
        (place / name).write_bytes(zstandard.compress("\n".join(contents).encode()))
    asked = [(f"What has the number {i}?", f"The file of number {i}.\n#### {i}") for i in range(40)]
    talks, pairs = io.StringIO(), io.StringIO()
    for question, answer in asked:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        talks.write(json.dumps({"messages": turns}) + "\n")
        pairs.write(json.dumps({"prompt": question, "chosen": answer, "rejected": "I do not know."}) + "\n")
    for name in ("chats.jsonl", "gsm8k_train.jsonl"):
        (place / name).write_text(talks.getvalue())
    (place / "pairs.jsonl").write_text(pairs.getvalue())
    gsm8k = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in asked)
    for split in ("train", "test"):
        (place / "tasks" / f"gsm8k_{split}.jsonl").write_text(gsm8k)
    task = {
        "task_id": "T/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    }
    (place / "tasks" / "HumanEval.jsonl").write_text("".join(json.dumps(task) + "\n" for _ in range(4)))
    choices = {"query": "Question: Which is a number?", "choices": ["one", "path", "file", "stack"], "gold": 0}
    (place / "tasks" / "foundry_arc_easy.jsonl").write_text((json.dumps(choices) + "\n") * 8)
    (place / "my_map.yaml").write_text("gsm8k:\n  test: tasks/gsm8k_test.jsonl\n  train: tasks/gsm8k_train.jsonl\n")
    (place / "my_parts.py").write_text(
        "from plmtune.modules.feed_forward import SwiGLU\nfrom plmtune.registry import register\n\n\n"
        '@register("ffn", "my_ffn")\ndef my_ffn(embed_dim: int, *, hidden_dim: int = 64) -> SwiGLU:\n'
        '    """A gate."""\n    return SwiGLU(embed_dim, hidden_dim=hidden_dim)\n'
    )
    (place / "mine.yaml").write_text(own_file(ROOT / "README.md"))
