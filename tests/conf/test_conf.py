"""Every built-in YAML is a test: it composes, validates and builds on the meta device."""

import pytest
import torch

from plmtune.config import compose
from plmtune.config.builtin import builtin_folder
from plmtune.errors import UserError
from plmtune.registry import describe_components

CONF = builtin_folder("conf")
RUNNABLE = sorted(path.stem for path in CONF.glob("*.yaml"))
PRESETS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*/*.yaml"))


@pytest.mark.parametrize("name", RUNNABLE)
def test_config_composes_and_builds(name: str) -> None:
    cfg = compose.compose(name)
    if cfg.recipe in ("quantize", "prune"):
        return  # its model is a checkpoint's
    base = "demo" if name.startswith("demo") else "pretrain"  # fine-tuning starts from the newest run
    chosen = cfg.model or compose.compose(base).model
    with torch.device("meta"):
        model = compose.build("model", chosen, vocab_size=1024)
    assert model.max_seq_len >= (cfg.seq_len or 1)  # None: as the model has it


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes_and_builds(name: str) -> None:
    group, _, option = name.rpartition("/")
    parent = ["model=plm_150m"] if option == "mla_150m" else []
    cfg = compose.compose("pretrain", (), [*parent, f"{group}={option}"])
    with torch.device("meta"):
        compose.build("model", cfg.model, vocab_size=1024)


def test_no_preset_bears_a_components_name() -> None:
    table = describe_components()
    for path in CONF.rglob("*/*.yaml"):
        assert path.stem not in table[path.parent.name], path


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("plm_20m", 18e6, 22e6), ("plm_150m", 140e6, 160e6), ("plm_tiny", 1e5, 1e6)]
)
def test_sizes_are_what_their_names_say(preset: str, low: float, high: float) -> None:
    with torch.device("meta"):
        model = compose.build("model", compose.compose("pretrain", (), [f"model={preset}"]).model, vocab_size=4096)
    assert low < sum(p.numel() for p in model.parameters()) < high


def test_plm_1_8b_is_the_papers_model() -> None:
    with torch.device("meta"):
        model = compose.build("model", compose.compose("plm_1.8b").model, vocab_size=151936)
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == 1_825_458_176
    assert len(parameters) == 290


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "aries"])
class TestBases:
    """What a person's own config builds on has defaults for 0.1B to 2B parameters, and asks for data."""

    def test_it_names_no_preset_of_the_demo(self, name: str) -> None:
        text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
        choices = text.split("defaults:")[1].split("_self_")[0]
        assert "demo" not in choices and "stdlib" not in choices and "docstring" not in choices
        assert compose.compose(name).optimizer.name == "adamw"

    def test_data_must_be_given_and_the_sentence_says_how(self, name: str) -> None:
        with pytest.raises(UserError, match=r"data\.paths=.*plmtune run demo"):
            compose.build("data", compose.compose(name).data)


def test_a_model_of_its_own_trains_by_the_base_configs_optimizer() -> None:
    cfg = compose.compose(
        "pretrain", (), ["model=plm_1.8b", "model/ffn=swiglu", "scheduler=cosine", "optimizer.lr=3e-4"]
    )
    assert cfg.optimizer.name == "adamw" and cfg.optimizer.settings["lr"] == 3e-4 and not cfg.phases


@pytest.mark.parametrize("name", ["demo", "demo_sft", "demo_dpo", "demo_aries"])
def test_a_demo_brings_its_data_and_has_runs_of_its_own(name: str) -> None:
    cfg = compose.compose(name)
    assert cfg.name == name
    assert cfg.data.name in ("stdlib", "docstrings", "docstring_pairs")


def test_every_first_line_says_what_it_is_for() -> None:
    for path in CONF.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path
