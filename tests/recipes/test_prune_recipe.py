"""The recipe prune: a smaller directory that loads like any other, with a report of what was kept."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plmtune.recipes import prune
from tuning import stop_in

import plmtune
from plmtune.cli import cli
from plmtune.config import compose
from plmtune.errors import UserError
from plmtune.export import verify
from plmtune.io.interruptible import Interruptible
from plmtune.models.gpt2 import gpt2
from plmtune.models.hf import save_model
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.pruning import depth
from plmtune.pruning.kept import Kept
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
SIZES: dict[str, Any] = {"embed_dim": 32, "num_layers": 3, "num_heads": 4, "max_seq_len": 64, "init_std": 0.2}


def _plm(vocab_size: int) -> Decoder:
    mla = component("attention", "mla", kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    return plm(vocab_size, attention=mla, ffn=component("ffn", "squared_relu", hidden_dim=48), **SIZES)


def _shortcuts(vocab_size: int) -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2, shortcut=component("shortcut", "augmented", reduction=2))
    return llama(vocab_size, attention=gqa, ffn=component("ffn", "swiglu", hidden_dim=48), **SIZES)


def _llama(vocab_size: int) -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=2)
    ffn = component("ffn", "swiglu", hidden_dim=48)
    return llama(vocab_size, attention=gqa, ffn=ffn, **SIZES | {"tie_embeddings": False})


def _gpt2(vocab_size: int) -> Decoder:
    gqa = component("attention", "gqa", num_kv_heads=4, rope=False, bias=True)
    return gpt2(vocab_size, attention=gqa, ffn=component("ffn", "gelu", hidden_dim=48), **SIZES)


FAMILIES = {"plm": _plm, "llama": _llama, "gpt2": _gpt2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small model of each of some families, and text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLMTUNE_KERNELS", "reference")
    tokenizer = byte()
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        save_model(make(tokenizer.vocab_size), None, tmp_path / name)
        tokenizer.save(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(*overrides: str) -> float | None:
    own = ["data=files", "data.paths=[text.txt]", "calibration_tokens=256", "test_tokens=256", "depth.tokens=64"]
    return prune.main(compose.compose("prune", (), [*own, "seq_len=32", "run_dir=out", *overrides]))


def report(directory: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(directory) / "prune.json").read_text())
    return found


class TestOneModel:
    @pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "activation"])
    def test_the_directory_loads_like_any_other_and_says_what_was_kept(
        self, importance: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = ["model.num_layers=2", "model.embed_dim=28", "model.num_heads=3", "model.ffn.hidden_dim=40"]
        loss = run(
            "checkpoint=plm", *sizes, "model.attention.kv_lora_rank=20", f"importance={importance}", "force=true"
        )
        said = capsys.readouterr().out
        assert "num_layers 3 -> 2, embed_dim 32 -> 28" in said and "force=true: this cut removes" in said
        assert "loss on 248 tokens" in said and f"units kept, by {importance}" in said
        found = report()
        model, tokenizer = plmtune.load("out", "cpu")
        assert found["loss"] == loss and found["sizes"]["attention.kv_lora_rank"] == 20
        assert found["parameters"] == sum(p.numel() for p in model.parameters()) < found["parameters_before"]
        assert len(found["layers"]) == 2 == len(model.layers) and set(found["layers"]) < {0, 1, 2}
        assert len(found["units"]["channels"]) == 28
        assert len(found["units"][f"layers.{found['layers'][1]}.neurons"]) == 40
        assert [row["layers"] for row in found["measured"]["rises"]].count(1) == 3
        assert (folder / "out/depth.png").stat().st_size > 5_000
        assert model(torch.tensor([tokenizer.encode("The quick")])).isfinite().all()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_layers_and_units_that_matter_stay(self, family: str, folder: Path) -> None:
        """A layer that adds nothing and neurons that give nothing go, and the loss stays."""
        model, tokenizer = plmtune.load(family, "cpu")
        with torch.no_grad():
            for name in ("attention.o_proj", "ffn.down_proj"):
                for parameter in model.layers[1].get_submodule(name).parameters():
                    parameter.zero_()
            for layer in model.layers:
                layer.ffn.down_proj.weight[:, 10:20] = 0
        save_model(model, None, folder / "idle")
        tokenizer.save(folder / "idle")
        loss = run("checkpoint=idle", "model.num_layers=2", "depth.importance=influence")
        assert report()["layers"] == [0, 2]
        assert loss == pytest.approx(report()["loss_before"], abs=1e-5)
        loss = run("checkpoint=idle", "model.ffn.hidden_dim=38", "importance=taylor", "run_dir=narrow")
        assert loss == pytest.approx(report("narrow")["loss_before"], abs=1e-5)
        assert report("narrow")["units"]["layers.0.neurons"] == [*range(10), *range(20, 48)]

    def test_layers_by_influence_and_by_hand(self, folder: Path) -> None:
        run("checkpoint=llama", "model.num_layers=2", "depth.importance=influence", "test_tokens=0")
        found = report()
        assert len(found["measured"]["influence"]) == 3 and found["loss"] is None
        assert found["layers"] == sorted(sorted(range(3), key=lambda i: -found["measured"]["influence"][i])[:2])
        run("checkpoint=llama", "depth.layers=[0,2]", "test_tokens=0", "run_dir=hand", "dtype=bf16")
        found = report("hand")
        assert found["layers"] == [0, 2] and found["depth"] == "hand" and found["calibration_tokens"] == 0
        small, big = plmtune.load("hand", "cpu")[0], plmtune.load("llama", "cpu")[0]
        wanted = big.layers[2].state_dict()
        assert all(torch.equal(t, wanted[name].bfloat16()) for name, t in small.layers[1].state_dict().items())

    def test_pretraining_takes_the_model_that_it_starts_from(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run("checkpoint=llama", "depth.layers=[0,2]", "test_tokens=0")
        own = ["data=files", "data.paths=[text.txt]", "phases=[{name: main, steps: 1}]", "seq_len=16", "--dry-run"]
        cli.main(["run", "pretrain", "init_from=out", "model=null", "tokenizer=null", *own], standalone_mode=False)
        said = capsys.readouterr()
        assert "starting from out" in said.err and "fits" in said.out

    @pytest.mark.parametrize("family", ["plm", "llama"])
    def test_a_pruned_model_generates_and_is_exported_and_verified(
        self, family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(verify, "verify", partial(verify.verify, positions=16, threads=1))
        run(f"checkpoint={family}", "model.ffn.hidden_dim=32", "model.num_heads=2", "depth.layers=[0,1]", "force=true")
        cli.main(["export", "out", "--to", "gguf", "--quant", "f32"], standalone_mode=False)
        assert "verified: it is" in capsys.readouterr().out
        words = ["generate", "out", "--prompt", "The", "--max-new-tokens", "4", "--temperature", "0"]
        cli.main(words, standalone_mode=False)
        assert capsys.readouterr().err.startswith("4 tokens")


def calls_of(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of a function, which is called as before."""
    found: list[tuple[Any, ...]] = []
    made = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        found.append(arguments)
        return made(*arguments, **named)

    patch.setattr(owner, name, call)
    return found


class TestResume:
    def test_layers_that_were_skipped_are_not_skipped_again(self, folder: Path) -> None:
        own = ("checkpoint=llama", "model.num_layers=2", "model.ffn.hidden_dim=40", "force=true")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            stop_in(patch, Interruptible, "stop_if_asked", 7)
            run(*own)
        assert Kept(Path("out"), "of another model").read("rises") == {}
        with pytest.MonkeyPatch.context() as patch:
            losses = calls_of(patch, depth, "_nats")
            run(*own, "resume=true")
        run(*own, "run_dir=whole")
        assert 0 < len(losses) < 7  # the whole model's, and those of fewer runs of layers than 6
        assert report()["measured"] == report("whole")["measured"]
        assert (folder / "out/model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()


class TestMask:
    OWN = ("checkpoint=llama", "importance=mask", "mask.batch_size=2", "mask.tokens=512", "mask.steps=14")
    SIZES = ("model.num_layers=2", "model.embed_dim=28", "model.ffn.hidden_dim=40", "model.num_heads=2", "force=true")

    def test_layers_and_units_are_learned_together(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run(*self.OWN, *self.SIZES)
        found = report()
        assert found["depth"] == found["importance"] == "mask" and len(found["layers"]) == 2
        targets = {name: mask["target"] for name, mask in found["measured"]["masks"].items()}
        assert targets.keys() == {
            "layers",
            "channels",
            *(f"layers.{i}.{k}" for i in range(3) for k in ("kv_heads", "neurons")),
        }
        assert targets["layers"] == pytest.approx(2 / 3) and targets["layers.1.kv_heads"] == 0.5
        assert "masks have not reached their size" in capsys.readouterr().out  # of 14 steps
        assert plmtune.load("out", "cpu")[0].layers[0].attention.num_kv_heads == 1

    def test_of_units_alone_beside_layers_by_hand(self, folder: Path) -> None:
        run(*self.OWN, "depth.layers=[0,2]", "model.ffn.hidden_dim=40", "force=true")
        masks = report()["measured"]["masks"]
        assert masks.keys() == {"layers.0.neurons", "layers.1.neurons"}
        assert report()["units"].keys() == {"layers.0.neurons", "layers.2.neurons"}

    @pytest.mark.parametrize("weights_lr", [0, 0.01])
    def test_one_that_is_stopped_leaves_no_model_and_resumes_at_its_step(
        self, weights_lr: float, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        own = (*self.OWN, *self.SIZES, f"mask.weights_lr={weights_lr}")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
            stop_in(patch, Interruptible, "stop_if_asked", 9)
            run(*own)
        assert stopped.value.code == 75
        assert "stopped; resume it with: plmtune resume out" in capfd.readouterr().err
        assert not [*(folder / "out").glob("*.safetensors")] and not (folder / "out/prune.json").exists()
        with pytest.raises(UserError, match=r"out is a run that was stopped, before it saved a model"):
            plmtune.load("out")
        with pytest.MonkeyPatch.context() as patch:
            steps = calls_of(patch, prune, "mean_loss")
            run(*own, "resume=true")
        said = re.search(r"mask: resumed at step (\d+)", capfd.readouterr().out)
        assert said and 0 < int(said[1]) == 14 - len(steps)
        run(*own, "run_dir=whole")
        assert (folder / "out/model.safetensors").read_bytes() == (folder / "whole/model.safetensors").read_bytes()
        assert not (folder / "out/measured").exists()
        assert run(*own, "resume=true") == report()["loss"]
        assert "out is finished: there is nothing to resume." in capfd.readouterr().out

    def test_the_weights_that_train_with_the_masks_are_those_of_the_model(self, folder: Path) -> None:
        """The pruned model has the trained numbers at the units that stay, and the checkpoint's where they stay."""
        own = (*self.OWN, "model.ffn.hidden_dim=40")
        run(*own, "run_dir=frozen")
        run(*own, "mask.weights_lr=0.01", "run_dir=trained")
        assert "weights" not in report("frozen")["measured"]
        assert report("trained")["measured"]["weights"] == {"lr": 0.01, "tokens": 14 * 2 * 32}
        assert report("trained")["loss"] < report("frozen")["loss"] - 0.1
        before = plmtune.load("llama", "cpu")[0].layers[0].ffn.down_proj.weight
        for name in ("frozen", "trained"):
            kept = before[:, report(name)["units"]["layers.0.neurons"]]
            after = plmtune.load(name, "cpu")[0].layers[0].ffn.down_proj.weight
            assert torch.equal(after, kept) == (name == "frozen")


class TestMistakes:
    def test_a_width_that_shortcuts_cannot_have_is_refused_before_a_run_begins(self, folder: Path) -> None:
        save_model(_shortcuts(byte().vocab_size), None, folder / "shortcuts")
        byte().save(folder / "shortcuts")
        with pytest.raises(UserError, match=r"shortcuts are 16 wide inside, and no .* gives that at 31"):
            run("checkpoint=shortcuts", "model.embed_dim=31")
        assert not (folder / "out").exists()

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["model.num_layers=1"], "removes .* more than a third.*force=true"),
            (["model.num_layers=2", "depth.layers=[0]"], r"names 1 layers, and model.num_layers is 2"),
            (["depth.layers=[0,7]"], "no layer 7: the checkpoint has layers 0 to 2"),
            (["model.num_heads=3"], "num_heads: 3 is no multiple of 2"),
            (["model.ffn.hidden_dim=40", "calibration_tokens=0"], "importance=taylor is measured on text"),
            (["model.ffn.hidden_dim=40", "importance=mask", "mask.steps=5"], r"cannot be reached in 5 steps"),
            (["model.ffn.hidden_dim=2", "importance=mask", "force=true"], r"held to 4.2% of its units"),
            (["model.ffn.hidden_dim=40", "calibration_tokens=9999"], r"calibration_tokens \(9,999\)"),
            (["model.ffn.hidden_dim=40", "importance=mask", "mask.tokens=9999"], r"mask.tokens \(9,999\)"),
        ],
    )
    def test_are_refused_before_a_run_begins(self, overrides: list[str], said: str, folder: Path) -> None:
        with pytest.raises(UserError, match=said):
            run("checkpoint=llama", *overrides)
        assert not (folder / "out").exists()
