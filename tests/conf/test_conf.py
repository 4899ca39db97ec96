"""Every YAML that ships is a test: it composes, validates and builds on the meta device."""

import pytest
import torch

from plmtune import config
from plmtune.registry import describe
from plmtune.shipped import folder

CONF = folder("conf")
RUNNABLE = sorted(path.stem for path in CONF.glob("*.yaml"))
PRESETS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*/*.yaml"))


@pytest.mark.parametrize("name", RUNNABLE)
def test_config_composes_and_builds(name: str) -> None:
    cfg = config.compose(name)
    if cfg.recipe == "quantize":
        return  # its model is a checkpoint's
    chosen = cfg.model or config.compose("pretrain").model  # fine-tuning goes on from the newest run, here the demo
    with torch.device("meta"):
        model = config.build("model", chosen, vocab_size=1024)
    assert model.max_seq_len >= cfg.seq_len


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes_and_builds(name: str) -> None:
    group, _, option = name.rpartition("/")
    parent = ["model=plm_150m"] if option == "mla_150m" else []
    cfg = config.compose("pretrain", (), [*parent, f"{group}={option}"])
    with torch.device("meta"):
        config.build("model", cfg.model, vocab_size=1024)


def test_no_preset_bears_a_components_name() -> None:
    table = describe()
    for path in CONF.rglob("*/*.yaml"):
        assert path.stem not in table[path.parent.name], path


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("plm_20m", 18e6, 22e6), ("plm_150m", 140e6, 160e6), ("plm_tiny", 1e5, 1e6)]
)
def test_sizes_are_what_their_names_say(preset: str, low: float, high: float) -> None:
    with torch.device("meta"):
        model = config.build("model", config.compose("pretrain", (), [f"model={preset}"]).model, vocab_size=4096)
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_plm_1_8b_is_the_papers_model() -> None:
    with torch.device("meta"):
        model = config.build("model", config.compose("plm_1.8b").model, vocab_size=151936)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == 1_825_458_176
    assert len(parameters) == 290


def test_every_first_line_says_what_it_is_for() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path
