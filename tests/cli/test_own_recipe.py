"""A recipe of a user's own, as docs/config.md shows it: its schema is checked, typed, shown and saved."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import run

from plmtune.config import typed_config
from plmtune.config.schema import SCHEMAS

DOCUMENT = Path(__file__).parents[2] / "docs/config.md"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The document's example in a file."""
    monkeypatch.chdir(tmp_path)
    text = re.search(r"```python\n(# mine.py.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert text is not None
    Path("mine.py").write_text(text[1])
    before = dict(SCHEMAS)
    yield tmp_path / "mine.py"
    SCHEMAS.update(before)
    sys.modules.pop("plmtune_recipe_mine", None)


class TestOwnRecipe:
    def test_its_keys_are_those_of_ours_and_its_own(
        self, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = run(monkeypatch, capsys, "validate", "mine.py", "noise=0.25", "--show")
        assert code == 0, err
        assert "noise: 0.25" in out and "mine.py: valid" in out
        Path("config.yaml").write_text(out.partition("mine.py: valid")[0])
        cfg = typed_config.load_config(Path("config.yaml"))  # as resume reads it
        assert cfg.noise == 0.25 and type(cfg).__name__ == "Config"
        code, out, err = run(monkeypatch, capsys, "run", "mine.py", "noise=0.5", "--dry-run")
        assert code == 0 and "noise 0.5" in out, err

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("nois=1", "override nois=1, key nois: unknown. Did you mean noise?"),
            ("noise=loud", "override noise=loud, key noise: loud is not a number."),
            ("noise=-1", "override noise=-1, key noise: must be at least 0, not -1.0."),
        ],
    )
    def test_a_mistake_in_its_own_keys_is_found(
        self,
        override: str,
        said: str,
        recipe: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert run(monkeypatch, capsys, "validate", "mine.py", override)[::2] == (2, f"plmtune: {said}\n")

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (
                "class Config(PretrainConfig):",
                "class Config:",
                "must be a dataclass that extends plmtune.config.schema.PretrainConfig",
            ),
            (" = 0.0", "", "TypeError"),
            ("Annotated[float, Range(least=0)]", "set", "Config cannot be a schema"),
            ('CONFIG = "demo"', 'CONFIG = "demoo"', "There is no config demoo. Did you mean demo"),
            ('CONFIG = "demo"', "", "CONFIG"),
            ("import pretrain", "import pretraining", "raises ImportError"),
        ],
    )
    def test_a_schema_that_cannot_be_one_is_refused(
        self, old: str, new: str, said: str, recipe: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        recipe.write_text(recipe.read_text().replace(old, new))
        code, _, err = run(monkeypatch, capsys, "validate", "mine.py")
        assert code == 2 and said in err and "Traceback" not in err, err
