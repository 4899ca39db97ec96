"""What every command prints, on terminals of 60, 80 and 120 columns, on a dumb one, through a pipe, and in ASCII.

Nothing is wider than the terminal but a word that is, such as a path, or a command to copy; no word or number is
broken; no row loses what names it.
"""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from in_process import begin_run, save_small

from plmtune.cli import main
from plmtune.devices import measure as devices_measure
from plmtune.devices.measure import Measurement
from plmtune.errors import UserError
from plmtune.evaluation import results
from plmtune.export import verify
from plmtune.io import manifest

WIDTHS = (60, 80, 120)
COMMAND = r"\s+(plmtune|\S*python[\d.]* -m|llama-cli) "
RUN = "runs/pretrain/20261130-06031"
TASKS = ("arc_easy", "mmlu_high_school_european_history", "wikitext")
SPEEDS = ("1,234.5", "987.6", "12.5")
TINY = ["model=plm_tiny", "tokenizer=byte", "data=files", "data.paths=[book.txt]", "runtime.precision=fp32",
        "seq_len=32", "global_batch_size=2", "micro_batch_size=2", "validation={every: 2, tokens: 100}", "logger=null",
        "sample.max_new_tokens=4"]  # fmt: skip

QUICK = {"positions": 8, "threads": 1}  # of a verification: by default llama.cpp's threads wait for each other

# name: (words, what its stdout must hold whole, exit code)
CASES: dict[str, tuple[list[str], list[str], int]] = {
    "runs": (["runs"], [f"{RUN}{i}" for i in range(5)] + ["finished", "failed", "killed", "345/12,000", "300"], 0),
    "checkpoints": (["checkpoints", f"{RUN}3"], ["100", "200", "300", "latest"], 0),
    "checkpoints of which one is damaged": (["checkpoints", f"{RUN}2"], ["damaged"], 2),
    "ls": (["ls"], ["demo_aries", "pretrain", "scheduler", "jetson_orin_nano"], 0),
    "ls of a group": (["ls", "attention"], ["kv_lora_rank", "qk_nope_head_dim"], 0),
    "ls of presets": (["ls", "model"], ["plm_1.8b", "plm_tiny"], 0),
    "ls devices": (["ls", "devices"], ["pi5", "jetson_orin_nano", "h200"], 0),
    "compare": (["compare", "a.json", "b.json"], ["a.json", *TASKS], 0),
    "compare of three": (["compare", "a.json", "b.json", "c.json"], ["c.json", *TASKS], 0),
    "eval --list": (["eval", "--list", "mmlu_high_school"], ["mmlu_high_school_european_history"], 0),
    "plan": (["plan", "demo", "model=plm_tiny", "--device", "pi5"], ["bf16", "q4_k_m", "plmtune"], 0),
    "plan --sweep": (["plan", "demo", "model=plm_tiny", "model.embed_dim=32,64", "model.num_layers=2",
                      "--sweep", "--context", "128"], ["32", "64", "tokens/s"], 0),
    "bench": (["bench", "model", "exports/a-model-of-a-longer-name-20261130-060310-Q4_K_M.gguf"],
              ["exports/a-model-of-a-longer-name-20261130-060310-Q4_K_M.gguf", "2,048", *SPEEDS], 0),
    "perplexity": (["perplexity", "model", "book.txt", "more/than/one/folder/deep/a_second_book_of_the_same.txt"],
                   ["book.txt", "more/than/one/folder/deep/a_second_book_of_the_same.txt", "all"], 0),
    "export": (["export", "model", "--to", "gguf", "--quant", "f32", "--overwrite"], ["exports/model-F32.gguf:"], 0),
    "data prepare": (["data", "prepare", "book.txt", "--tokenizer", "byte", "--out", "shards"], ["documents"], 0),
    "data inspect": (["data", "inspect", "{shards}"], ["train", "validation"], 0),
    "data inspect --window": (["data", "inspect", "{shards}", "--window", "0", "--mask"], [], 0),
    "data inspect of chats": (["data", "inspect", "chats.jsonl", "--tokenizer", "byte", "--template", "plain"],
                              ["conversation", "trained", "shortest" ], 0),
    "data inspect of pairs": (["data", "inspect", "pairs.jsonl", "--tokenizer", "byte", "--template", "plain"],
                              ["prompt", "chosen", "rejected"], 0),
    "tokenizer inspect": (["tokenizer", "inspect", "bundled", "def main(): return 12345"], ["ids"], 0),
    "card": (["card", "model", "--overwrite"], ["model/README.md:"], 0),
    "validate": (["validate", "demo", *TINY], ["demo:", "valid."], 0),
    "a dry run": (["run", "demo", "--dry-run", *TINY], ["parameters", "available", "phase"], 0),
    "generate": (["generate", "model", "--prompt", "a", "--max-new-tokens", "3", "--temperature", "0"], [], 0),
    "generate with a killed run": (["generate", f"{RUN}3", "--prompt", "a", "--max-new-tokens", "3"], [], 0),
    "a mistake": (["run", "demo", "optimizer.lerning_rate=0.1"], [], 2),
    "resume of what is finished": (["resume", f"{RUN}0"], [f"init_from={RUN}0"], 0),
    "verify": (["verify", "exports/model-F32.gguf", "--against", "model"], ["perplexity"], 0),
    "convert": (["convert", "exports/model-F32.gguf", "converted", "--overwrite"], ["converted:", "6,672"], 0),
    "a wrong option": (["bench", "--devcie", "cpu", "--context", "128"], [], 2),
    "no result to compare": (["compare", "folder-without-results"], [], 2),
    "ls of a command": (["ls", "runs"], [], 2),
    "version": (["--version"], ["plmtune,"], 0),
}  # fmt: skip


# What a pipe gets in another form: tabs in place of a table, signs in place of colours, another scale, what a model
# writes as it is.
OTHERWISE = (
    "eval --list",
    "generate",
    "generate with a killed run",
    "data inspect of chats",
    "data inspect of pairs",
    "data inspect --window",
)


class Screen(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def shown(
    words: list[str], width: int | None, *, term: str = "xterm-256color", encoding: str = "utf-8"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `plmtune WORDS` on a terminal of that width, or through a pipe."""
    buffers = io.BytesIO(), io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, buffer in zip(("stdout", "stderr"), buffers, strict=True):
            kind = io.TextIOWrapper if width is None else Screen
            patch.setattr(sys, name, kind(buffer, encoding, write_through=True))
        patch.setattr(sys, "argv", ["plmtune", *words])
        patch.setenv("TERM", term)
        patch.delenv("NO_COLOR", raising=False)
        patch.setenv("COLUMNS", str(width or 60))  # which a pipe does not heed
        with pytest.raises(SystemExit) as exit:
            main()
        texts = [buffer.getvalue().decode(encoding) for buffer in buffers]
    return int(exit.value.code or 0), texts[0], texts[1]


def plain(text: str) -> str:
    """The text without a terminal's codes; what is drawn over is a line of its own."""
    return re.sub(r"\033\[[\d;]*m", "", text.replace("\r\033[2K", "\n"))


def too_wide(text: str, width: int) -> list[str]:
    """The lines that are wider, but for a single word and a command to copy."""
    return [
        line
        for line in plain(text).splitlines()
        if len(line) > width and len(line.split()) > 1 and (not re.match(COMMAND, line) or ". " in line)
    ]


def score(value: float, stderr: float, metric: str = "acc,none") -> dict[str, Any]:
    return {metric: {"value": value, "stderr": stderr, "higher_is_better": metric.startswith("acc")}}


def result(name: str, shift: float) -> dict[str, Any]:
    entries = {
        TASKS[0]: score(0.4123 + shift, 0.0101),
        TASKS[1]: score(0.2512 + shift, 0.0321),
        TASKS[2]: score(12345.678 + shift, 12.5, "word_perplexity,none"),
    }
    tasks = {
        task: {
            "version": 1.0,
            "num_fewshot": 0,
            "samples": 2376,
            "documents": 2376,
            "prompt_hash": None,
            "metrics": one,
        }
        for task, one in entries.items()
    }
    return {
        "format": results.FORMAT, "version": results.VERSION, "status": "complete",
        "model": {"name": name, "path": name, "digest": name, "parameters": None, "dtype": "float32", "step": None},
        "settings": {"limit": None}, "environment": {}, "git": None, "started": "2026-11-30T06:03:10Z", "seconds": 1.0,
        "tasks": tasks, "groups": {}, "failed": {"humaneval": "it needs code, which was not allowed to run"},
        "samples": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with all that the cases name."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PLMTUNE_KERNELS", "reference")
        save_small(place / "model")
        text = "The quick brown fox jumps over the lazy dog. " * 40
        for name in ("book.txt", "more/than/one/folder/deep/a_second_book_of_the_same.txt"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        turns = [
            {"role": "user", "content": "What is a stack?"},
            {"role": "assistant", "content": "Last in, first out. " * 9},
        ]
        (place / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        pair = {"prompt": "What is a stack?", "chosen": "Last in, first out. " * 9, "rejected": "A heap."}
        (place / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
        for name, shift in (("a", 0.0), ("b", 0.0456), ("c", -0.0123)):
            results.save(result(name, shift), place / f"{name}.json")
        _make_runs(place)
        exact = verify.verify
        patch.setattr(verify, "verify", lambda *files, **options: exact(*files, **options | QUICK))
        assert shown(CASES["export"][0], None)[0] == 0
        patch.setattr(devices_measure, "measure", _measured)
        patch.setattr("plmtune.devices.measure.read_bandwidth", lambda device: 2e9)
        patch.setattr("plmtune.evaluation.comparison_plot.draw", lambda *arguments: None)
        patch.setattr("plmtune.training.estimate.available_memory", lambda device: 2**34)
        patch.setattr("plmtune.training.estimate.resident_memory", lambda: 2**28)
        yield place


def _make_runs(place: Path) -> None:
    with begin_run(Path(f"{RUN}0"), 12000, 12000):
        pass
    with pytest.raises(UserError), begin_run(Path(f"{RUN}1"), 7, 12000):
        raise UserError("The disk is full. Make room.")
    for number in (2, 3):  # which are killed
        run = begin_run(Path(f"{RUN}{number}"), 345, 12000)
        for step in (100, 200, 300):
            directory = save_small(manifest.step_path(run.checkpoints, step))
            manifest.write(directory, step, {})
        (run.checkpoints / "latest").write_text("step-00000300\n")
        run.close()
    (place / f"{RUN}2/checkpoints/step-00000200/config.json").write_text("{}")
    begin_run(Path(f"{RUN}4"), 12, 12000).close()


def _measured(target: str, *, contexts: Any, **settings: object) -> list[Measurement]:
    runtime, weights = ("llama.cpp", "Q4_K_M") if target.endswith(".gguf") else ("plmtune", "fp32, rows in bf16")
    speeds = (1234.5, 987.6) if runtime == "plmtune" else (12.5, 987.6)
    return [
        Measurement(
            target, runtime, weights, context, 2, 0.123, 12345.6, speed, 123 * 2**20, 45 * 2**20, 2**20, 0.87, (1, 2)
        )
        for context, speed in zip(contexts, speeds, strict=True)
    ]


@pytest.fixture
def words(request: pytest.FixtureRequest, place: Path) -> list[str]:
    """The words of a case."""
    if any("{shards}" in word for word in CASES[request.param][0]):
        shown(CASES["data prepare"][0], None)
        (shards,) = [path.parent for path in (place / "shards").glob("*/manifest.json")]
        return [word.format(shards=shards.relative_to(place)) for word in CASES[request.param][0]]
    return CASES[request.param][0]


@pytest.mark.parametrize(("words", "case"), [(name, name) for name in CASES], indirect=["words"], ids=CASES)
def test_fits_keeps_its_words_whole_and_its_rows_named(words: list[str], case: str) -> None:
    _, keys, wanted = CASES[case]
    code, piped, said = shown(words, None)
    assert code == wanted, said
    assert "\033" not in piped + said
    whole = set(piped.split())
    for width in WIDTHS:
        code, out, err = shown(words, width)
        assert (code, too_wide(out, width), too_wide(err, width)) == (wanted, [], [])
        text = re.sub(r"Not shown in.*?shows all\.", "", plain(out), flags=re.DOTALL)
        found = set(text.split())
        assert found <= whole or case in OTHERWISE, (width, found - whole)
        assert not (lost := set(keys) - found - {word.rstrip(",") for word in found}), (width, lost)


@pytest.mark.parametrize(("words", "case"), [(name, name) for name in CASES], indirect=["words"], ids=CASES)
def test_dumb_terminals_get_no_codes_and_ascii_streams_no_other_characters(words: list[str], case: str) -> None:
    wanted = CASES[case][2]
    code, out, err = shown(words, 80, term="dumb", encoding="ascii")
    assert code == wanted and "\033" not in out + err and "\r" not in out + err
    assert (too_wide(out, 80), too_wide(err, 80)) == ([], [])


def test_a_multirun_ends_with_its_table_on_a_narrow_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmtune.recipes.pretrain.draw_curves", lambda *paths: None)
    monkeypatch.setattr("plmtune.training.machine._measured_flops", lambda *arguments: 1e11)
    jobs = ["optimizer=adamw", "optimizer.lr=0.001,0.002", "phases=[{name: main, steps: 2}]", "scheduler=constant"]
    code, out, err = shown(["run", "-m", "demo", *TINY, *jobs], 60)
    assert (code, too_wide(out, 60), too_wide(err, 60)) == (0, [], [])
    words = plain(out).split()
    (first, second) = [word for word in words if re.fullmatch(r"runs/multirun/[\d-]+/[01]", word)]
    assert first < second and {"optimizer.lr=0.001", "optimizer.lr=0.002", "2/2", "finished"} <= {*words}
    assert "step 2/2" in plain(err)


@pytest.mark.parametrize(("redirected", "code"), [(">&-", 0), (">&- 2>&- <&-", 0), ("| head -0", 141)])
def test_a_closed_stdout_is_no_mistake_of_the_program(redirected: str, code: int) -> None:
    line = f"{sys.executable} -m plmtune ls model {redirected}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
