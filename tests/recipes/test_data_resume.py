"""Where a run is cut, and among how many processes and loader threads it goes on, does not change what it reads."""

import json
import re
import shutil
from pathlib import Path

import pytest
from cli_runs import SMALL, Run, metrics, refusal, start, weights

# 26 windows of 32 tokens in `few`, which is read almost twice; 12 steps in two phases, neither of them cut at its end.
MIXED = (
    "data=mix",
    "data.sources={few: {component: files, paths: [corpus/00.txt]}}",
    "+data.sources.many={component: files, paths: [corpus/1*.txt]}",
    "phases=[{name: one, steps: 5, mix: {few: 1}}, {name: two, steps: 7, mix: {few: 1, many: 1}}]",
    "checkpoint={every: 2, keep: 0}",
)
COMMAND = ("run", "pretrain", *(text for text in SMALL if not text.startswith("data")), *MIXED)


def rewind(run: Path, step: int) -> None:
    """Make a finished run one that was stopped after `step`."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "stopped"}))


def order(run: Path) -> str:
    """The hash of the order of everything that the run has read."""
    newest = max((run / "checkpoints").glob("step-*"))
    digest = json.loads((newest / "state.json").read_text())["state"]["order"]
    assert len(digest) == 32
    return str(digest)


def test_a_run_cut_inside_an_epoch_a_block_and_a_phase_resumes_with_the_next_batch(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("run_dir=whole", *MIXED)
    shutil.copytree(place / "whole", place / "cut")
    for step, workers in ((8, 2), (4, 0)):
        rewind(place / "cut", step)
        start("run_dir=cut", f"num_workers={workers}", "resume=true", *MIXED)
        assert metrics(place / "cut") == metrics(place / "whole")
        assert weights(place / "cut") == weights(place / "whole")
        assert order(place / "cut") == order(place / "whole")
    rewind(place / "cut", 8)
    with monkeypatch.context() as patch:  # another version, by which less of `few` was read
        patch.setattr("plmtune.data.order.quotas", lambda weights, n: [1, n - 1] if all(weights) else [n, 0])
        said = refusal("run_dir=cut", "resume=true", *MIXED)
    assert re.search(r"step-0+8 has drawn other sequences \(few 26, many 6\) than .* \(few 2\d, many", said), said
    start("run_dir=other", "seed=2", *MIXED)
    assert order(place / "other") != order(place / "whole")


@pytest.mark.slow
def test_two_processes_then_one_then_two_read_what_two_read(place: Path, plmtune: Run) -> None:
    whole = plmtune(*COMMAND, "run_dir=whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    for workers in (0, 2):
        run = f"changing-{workers}"
        shutil.copytree(place / "whole", place / run)
        rewind(place / run, 4)
        start(f"run_dir={run}", f"num_workers={workers}", "resume=true", *MIXED)
        rewind(place / run, 8)
        again = plmtune(*COMMAND, f"run_dir={run}", f"num_workers={workers}", "resume=true", processes=2)
        assert again.returncode == 0, again.stderr
        assert order(place / run) == order(place / "whole")
        one, other = (
            [(e["step"], e["phase"], e["loss"]) for e in metrics(place / name) if "loss" in e]
            for name in (run, "whole")
        )
        assert [entry[:2] for entry in one] == [entry[:2] for entry in other]
        assert [entry[2] for entry in one] == pytest.approx([entry[2] for entry in other], rel=1e-6)
        assert len(one) == 12
