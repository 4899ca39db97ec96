"""Files of others that once took all memory or time: each command that reads them refuses them by name, cheaply."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plmtune.config import compose
from plmtune.models.hf import save_model
from plmtune.tokenizers.tokenizer_files import bundled

FILES = Path(__file__).parents[3] / "shared" / "cases" / "files"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="no ../shared/cases/files")

# Runs a command; its last line is the peak memory in KiB. A process of its own, because a child counts the memory of
# the process that started it. Seconds of CPU time: 5, and what starting takes.
LIMITED = """
import resource, subprocess, sys
resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (5 + 10, 5 + 10))
code = subprocess.run([sys.executable, "-m", "plmtune", *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
# A command; what it says.
REFUSED = {
    "numbers that double in a template": (
        ["data", "inspect", "{files}/chats.jsonl", "--template", "{files}/t07_mul.jinja"],
        "t07_mul.jinja computes with a number of more than 4,096 bits",
    ),
    "a text that doubles in a template": (
        ["data", "inspect", "{files}/chats.jsonl", "--template", "{files}/t08_concat.jinja"],
        "t08_concat.jinja makes or reads more than",
    ),
    "a template of a training run": (
        ["run", "sft", "init_from=base", "data.paths=[{files}/chats.jsonl]", "chat.template={files}/t08_concat.jinja"],
        "t08_concat.jinja makes or reads more than",
    ),
    "a pattern that tries every split, in a conversation": (
        ["data", "inspect", "talk.jsonl", "--tokenizer", "{files}/tok_regex"],
        "tokenizer.json, key pre_tokenizer: the pattern '(?:a|aa)+(?!a|!)|\\\\s+|.' does not come to an end",
    ),
    "a pattern that tries every split, in text": (
        ["data", "prepare", "text", "--out", "prepared", "--tokenizer", "{files}/tok_regex"],
        "tokenizer.json, key pre_tokenizer: the pattern '(?:a|aa)+(?!a|!)|\\\\s+|.' does not come to an end",
    ),
}
# Files of another one, by another command.
SLOW = ("a template of a training run", "a pattern that tries every split, in text")


def limited(place: Path, words: list[str]) -> tuple[int, str, str, int]:
    """Exit code, output, what went to stderr, and peak memory in bytes."""
    words = [word.replace("{files}", str(FILES)) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words], cwd=place, capture_output=True, text=True, check=False
    )
    said, _, peak = done.stderr.rstrip().rpartition("\n")
    return done.returncode, done.stdout, said, int(peak) * 1024


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in REFUSED]
)
def test_is_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    text = "a" * 5_000 + "!"
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(text)
    words, sentence = REFUSED[name]
    if "init_from=base" in words:
        tokenizer = bundled()
        model = compose.compose("pretrain", (), ["model=plm_tiny"]).model(vocab_size=tokenizer.vocab_size)
        save_model(model, None, tmp_path / "base")
        tokenizer.save(tmp_path / "base")
    code, _, said, peak = limited(tmp_path, words)
    assert code == 2, said
    assert sentence in said
    assert "Traceback" not in said
    assert peak < 1 << 30
    assert not {"prepared", "runs"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("further", [[], ["--tokenizer", "{files}/tok_regex"]])
def test_what_is_right_in_them_is_read(tmp_path: Path, further: list[str]) -> None:
    code, out, said, peak = limited(tmp_path, ["data", "inspect", "{files}/chats.jsonl", *further])
    assert code == 0, said
    assert "5 can be used, 0 cannot" in out
    assert peak < 1 << 30
