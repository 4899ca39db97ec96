"""A copy of a recipe in which a user changes the step and adds a key: `plmtune cp recipes/pretrain mine.py`."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import SMALL, ends_with, metrics

from plmtune.config.schema import SCHEMAS
from plmtune.io.run_directory import resume_command

CHANGES = {
    "import PretrainConfig as Config\n": "import PretrainConfig\n",
    'CONFIG = "pretrain"  # conf/pretrain.yaml\n': """from dataclasses import dataclass
CONFIG = "pretrain"


@dataclass
class Config(PretrainConfig):
    norm_penalty: float = 0.0  # times the square of the last norm's weight
""",
    "loss = self._loss(batch.to(runtime.device))\n": """loss = self._loss(batch.to(runtime.device))
                    loss = loss + self.cfg.norm_penalty * batch.num_valid * self.model.norm.weight.square().mean()
""",
}
SHORT = [*SMALL, "phases=[{name: main, steps: 3}]"]


@pytest.fixture
def changed(place: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    """mine.py with the changes."""
    assert ends_with("cp", "recipes/pretrain", "mine.py") == 0
    assert "Use it with: plmtune run mine.py" in capsys.readouterr().out
    text = Path("mine.py").read_text()
    for old, new in CHANGES.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    Path("mine.py").write_text(text)
    schemas = dict(SCHEMAS)
    yield place
    SCHEMAS.update(schemas)
    sys.modules.pop("plmtune_recipe_mine", None)


def test_the_changed_step_trains_with_the_new_key(changed: Path) -> None:
    assert ends_with("run", "mine.py", *SHORT, "run_dir=none") == 0
    assert ends_with("run", "mine.py", *SHORT, "norm_penalty=0.5", "run_dir=half") == 0
    (first, *_), (penalized, *_) = metrics(changed / "none"), metrics(changed / "half")
    assert penalized["loss"] == pytest.approx(first["loss"] + 0.5, abs=1e-4)  # a new norm's weight is 1
    assert penalized["grad_norm"] != first["grad_norm"]
    assert ends_with("validate", "mine.py", *SHORT, "norm_penality=1") == 2


def test_its_run_resumes_with_the_key_as_it_was(changed: Path) -> None:
    assert ends_with("run", "mine.py", *SHORT, "norm_penalty=0.5", "checkpoint.every=1", "run_dir=half") == 0
    run, whole = changed / "half", metrics(changed / "half")
    shutil.rmtree(run / "checkpoints/step-00000003")  # as if a kill had come before it
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    assert resume_command(Path("half")) == "plmtune resume half --recipe mine.py"
    assert ends_with("resume", "half", "--recipe", "mine.py", "norm_penalty=1") == 2
    assert ends_with("resume", "half", "--recipe", "mine.py") == 0
    assert metrics(run) == whole
