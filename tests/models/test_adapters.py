"""Adapters on disk: what PEFT makes of ours and we of PEFT's, and that no other base is taken for theirs."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_families import make
from safetensors.torch import load_file, save_file
from saved_adapters import save_adapter
from torch import Tensor

import plmtune
from plmtune.errors import UserError
from plmtune.export.huggingface import export_adapter
from plmtune.models import adapters, hf
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.peft import adapter_parameters, init_adapters
from plmtune.registry import component, load
from plmtune.tokenizers.tokenizer_files import byte
from plmtune.training.checkpoint import Checkpoints

TOKENS = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(1))


def base(architecture: str, directory: Path) -> Decoder:
    torch.manual_seed(0)
    tokenizer = byte()
    rest: dict[str, Any] = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 32, "init_std": 0.15}
    if architecture == "llama":
        attention = component("attention", "gqa", num_kv_heads=2)
        model = llama(tokenizer.vocab_size, attention=attention, ffn=component("ffn", "swiglu", hidden_dim=128), **rest)
    else:
        attention = component(
            "attention", "mla", kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        )
        ffn = component("ffn", "squared_relu", hidden_dim=128)
        model = plm(tokenizer.vocab_size, attention=attention, ffn=ffn, **rest)
    hf.save_model(model, None, directory)
    tokenizer.save(directory)
    return model


def teach(model: Decoder, kind: str, **settings: Any) -> Decoder:
    load("peft", kind)(model=model, **{"rank": 4, "alpha": 6.0, **settings})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def taught(tmp_path: Path) -> Callable[..., Decoder]:
    """Write a base and adapters beside each other; returns the model that they are of."""

    def make(kind: str = "lora", architecture: str = "plm", **settings: Any) -> Decoder:
        model = teach(base(architecture, tmp_path / "base"), kind, **settings)
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        byte().save(tmp_path / "adapter")
        return model

    return make


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


class TestNames:
    def test_are_pefts(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        taught("dora", targets=("kv_a_proj",))
        layer = "base_model.model.model.layers.1.self_attn.kv_a_proj_with_mqa"
        held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {name for name in held if name.startswith(layer)} == {
            f"{layer}.lora_A.weight",
            f"{layer}.lora_B.weight",
            f"{layer}.lora_magnitude_vector",
        }
        assert len(held) == 6
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, True)
        assert config["target_modules"] == ["kv_a_proj_with_mqa"]

    def test_the_tensors_are_the_models_own(self, taught: Callable[..., Decoder]) -> None:
        model = taught()
        for tensor in adapters.adapter_state(model).values():
            tensor.zero_()
        assert all(not parameter.any() for parameter in adapter_parameters(model).values())


@torch.no_grad()
def in_peft(tmp_path: Path) -> Tensor:
    """The logits that PEFT computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    logits: Tensor = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(TOKENS).logits
    return logits


class TestPeft:
    @pytest.mark.parametrize("kind", ["lora", "dora"])
    def test_loads_ours_and_we_load_what_it_saves(
        self, kind: str, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = taught(kind, "llama", targets=("q_proj", "v_proj", "ffn"))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        with torch.no_grad():
            close(theirs(TOKENS).logits, model(TOKENS))
            theirs.save_pretrained(tmp_path / "theirs")
            loaded, _ = plmtune.load(tmp_path / "theirs", "cpu")
            close(loaded(TOKENS), model(TOKENS))

    @pytest.mark.parametrize("beginning", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
    def test_reads_as_we_do_what_began_beside_the_plain_base(
        self, beginning: str | bool | None, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        model = taught("lora", "llama", targets=("q_proj", "v_proj", "ffn"))
        rename(tmp_path / "adapter", str(tmp_path / "base"), init_lora_weights=beginning)
        close(in_peft(tmp_path), model(TOKENS))
        loaded, _ = plmtune.load(tmp_path / "adapter", "cpu")
        close(loaded(TOKENS), model(TOKENS))

    @pytest.mark.parametrize("beginning", ["pissa", "pissa_niter_4", "olora"])
    def test_makes_another_model_of_what_we_refuse(
        self, beginning: str, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        model = taught("lora", "llama", targets=("q_proj", "v_proj", "ffn"))
        rename(tmp_path / "adapter", str(tmp_path / "base"), init_lora_weights=beginning)
        assert (in_peft(tmp_path) - model(TOKENS)).abs().max() > 0.1
        with pytest.raises(UserError, match=f"init_lora_weights is '{beginning}'"):
            plmtune.load(tmp_path / "adapter", "cpu")


class TestLoad:
    @pytest.mark.parametrize("kind", ["lora", "qlora", "dora"])
    @pytest.mark.parametrize("architecture", ["plm", "llama"])
    def test_gives_the_merged_model(
        self, kind: str, architecture: str, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        model = taught(kind, architecture)
        loaded, tokenizer = plmtune.load(tmp_path / "adapter", "cpu")
        close(loaded(TOKENS), model(TOKENS))
        assert loaded.state_dict().keys() == base(architecture, tmp_path / "again").state_dict().keys()
        assert tokenizer.fingerprint == byte().fingerprint

    def test_fills_a_model_for_further_training(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        model = taught()
        other = base("plm", tmp_path / "again")
        adapters.load_state(other, tmp_path / "adapter")
        close(other(TOKENS), model(TOKENS))
        assert all(parameter.requires_grad for parameter in other.parameters())

    def test_adapters_of_a_model_with_adapters_have_both(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        taught()
        second = teach(adapters.load_model(tmp_path / "adapter"), "dora", targets=("ffn",))
        save_adapter(second, tmp_path / "second", tmp_path / "adapter")
        close(adapters.load_model(tmp_path / "second")(TOKENS), second(TOKENS))
        assert adapters.read_model_config(tmp_path / "second") == second.config
        assert adapters.load_model_tokenizer(tmp_path / "second").fingerprint == byte().fingerprint

    def test_a_score_head_comes_along(self, tmp_path: Path) -> None:
        model = base("plm", tmp_path / "base")
        model.add_score_head()
        teach(model, "lora")
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
        loaded = adapters.load_model(tmp_path / "adapter")
        assert torch.equal(loaded.score.weight, model.score.weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gives_the_dtype_asked_for(
        self, dtype: torch.dtype, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        taught()
        assert plmtune.load(tmp_path / "adapter", "cpu", dtype)[0].head_weight.dtype == dtype


class TestCheckpoints:
    @pytest.mark.parametrize("kind", ["lora", "qlora", "dora"])
    def test_training_with_dropout_resumes_bit_for_bit_and_any_checkpoint_can_be_loaded(
        self, kind: str, tmp_path: Path
    ) -> None:
        base("plm", tmp_path / "base")

        def begin(directory: Path) -> tuple[Any, Any, Any, Checkpoints]:
            model = hf.load_model(tmp_path / "base").train()
            load("peft", kind)(model=model, rank=4, dropout=0.3)
            init_adapters(model, torch.Generator().manual_seed(4))
            optimizer = load("optimizer", "adamw")(model=model, lr=1e-2)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
            config = adapters.adapter_config(model, tmp_path / "base")

            def describe(directory: Path) -> None:
                adapters.write_adapter_config(directory, config)
                byte().save(directory)

            kept = Checkpoints(
                directory, state_dict=adapters.adapter_state, stem=adapters.ADAPTERS, write_metadata=describe
            )
            return model, optimizer, scheduler, kept

        def train(model: Any, optimizer: Any, steps: int) -> None:
            for _ in range(steps):
                model(TOKENS).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        model, optimizer, scheduler, checkpoints = begin(tmp_path / "run" / "checkpoints")
        torch.manual_seed(6)
        train(model, optimizer, 2)
        path = checkpoints.save(2, model=model, optimizer=optimizer, scheduler=scheduler, wait=True)
        saved = copy.deepcopy(model).eval()(TOKENS)
        train(model, optimizer, 2)
        other, its_optimizer, its_scheduler, _ = begin(tmp_path / "other")
        checkpoints.restore(path, model=other, optimizer=its_optimizer, scheduler=its_scheduler)
        train(other, its_optimizer, 2)
        ours, theirs = adapters.adapter_state(model), adapters.adapter_state(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        close(plmtune.load(tmp_path / "run", "cpu")[0](TOKENS), saved)
        assert not list(path.glob("model*"))


class TestBase:
    def test_is_found_when_the_tree_has_moved_and_the_name_is_relative(
        self, taught: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = taught()
        rename(tmp_path / "adapter", "runs/base")
        shutil.move(tmp_path / "adapter", tmp_path / "new" / "runs" / "sft" / "adapter")
        shutil.move(tmp_path / "base", tmp_path / "new" / "runs" / "base")
        monkeypatch.chdir(tmp_path)
        close(adapters.load_model(tmp_path / "new" / "runs" / "sft" / "adapter")(TOKENS), model(TOKENS))

    def test_that_is_gone_is_asked_for_and_can_be_named(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        model = taught()
        shutil.move(tmp_path / "base", tmp_path / "elsewhere")
        with pytest.raises(UserError, match=r"the base .* is not a directory here\. Give its place with --base"):
            plmtune.load(tmp_path / "adapter", "cpu")
        close(adapters.load_model(tmp_path / "adapter", base=tmp_path / "elsewhere")(TOKENS), model(TOKENS))

    def test_with_other_weights_is_refused(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        taught()
        other = base("plm", tmp_path / "other")
        with torch.no_grad():
            other.norm.weight[0] += 1e-3
        hf.save_model(other, None, tmp_path / "other")
        for directory in (tmp_path / "other", None):
            if directory is None:
                (tmp_path / "other" / "model.safetensors").replace(tmp_path / "base" / "model.safetensors")
            with pytest.raises(UserError, match=r"was trained beside other weights than those of"):
                adapters.load_model(tmp_path / "adapter", base=directory)

    def test_in_a_circle_is_refused(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        taught()
        rename(tmp_path / "adapter", str(tmp_path / "adapter"), plmtune={"component": "lora"})
        with pytest.raises(UserError, match=r"has a base that has a base"):
            adapters.load_model(tmp_path / "adapter")


def rename(directory: Path, name: str, **keys: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name} | keys))


class TestBadAdapters:
    def test_a_key_nobody_knows_is_refused_where_it_says_something(
        self, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        taught()
        rename(tmp_path / "adapter", str(tmp_path / "base"), use_newlora=False, newlora_config=None)
        adapters.load_model(tmp_path / "adapter")
        rename(tmp_path / "adapter", str(tmp_path / "base"), use_newlora=True)
        with pytest.raises(UserError, match=r"use_newlora \(True\) is not supported"):
            adapters.load_model(tmp_path / "adapter")

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"peft_type": "IA3"}, r"peft_type must be LORA"),
            ({"bias": "all"}, r"bias none"),
            ({"use_rslora": True}, r"use_rslora \(True\) is not supported"),
            ({"init_lora_weights": "corda"}, r"is 'corda', with which PEFT may change the base's weights"),
            ({"init_lora_weights": "loftq"}, r"another model. Save them with path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "lora_ga"}, r"init_lora_weights is 'lora_ga'"),
            ({"init_lora_weights": "unheard"}, r"init_lora_weights is 'unheard'"),
            ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern .* is not supported"),
            ({"plmtune": {"component": "adapter"}}, r"'adapter' is none of lora, qlora, dora"),
            ({"plmtune": [1]}, r"key plmtune: must be a table"),
            ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
            ({"r": 10**9}, r"r is 1000000000, more than any layer is wide"),
            ({"r": "4"}, r"r, lora_alpha or lora_dropout is missing or no number"),
            ({"r": -1}, r"does not fit the model: rank \(-1\) must be at least 1"),
            ({"target_modules": "all-linear"}, r"misses the tensor .*kv_a_proj_with_mqa.lora_A"),
            ({"target_modules": 3}, r"target_modules must be a list of names, not 3"),
            ({"exclude_modules": "q.*"}, r"exclude_modules must be a list of names, not 'q\.\*'"),
            ({"exclude_modules": ["q_proj"]}, r"holds the tensor .*q_proj.*, not listed in adapter_config.json"),
            ({"layers_to_transform": ["1"]}, r"layers_to_transform must be a list of whole numbers"),
            ({"layers_to_transform": 1}, r"holds the tensor .*layers\.0\..*, not listed in adapter_config.json"),
            ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern .* is not supported"),
            ({"target_modules": ["c_attn"]}, r"target_modules names 'c_attn'; the model has down_proj"),
            ({"r": 3}, r"has shape \[4, 64\]"),
            ({"use_dora": True, "plmtune": {}}, r"misses the tensor .*lora_magnitude_vector"),
            ({"target_modules": ["q_proj"]}, r"holds the tensor .* not listed in adapter_config.json"),
            ({"base_model_name_or_path": None}, r"names no base_model_name_or_path"),
        ],
    )
    def test_a_config_that_does_not_fit_is_a_sentence(
        self, keys: dict[str, Any], message: str, taught: Callable[..., Decoder], tmp_path: Path
    ) -> None:
        taught(targets=("q_proj", "down_proj"))
        rename(tmp_path / "adapter", str(tmp_path / "base"), **keys)
        with pytest.raises(UserError, match=message):
            adapters.load_model(tmp_path / "adapter")

    def test_damaged_files_are_sentences(self, taught: Callable[..., Decoder], tmp_path: Path) -> None:
        taught()
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors, content = load_file(path), path.read_bytes()
        save_file(dict(list(tensors.items())[1:]), path)
        with pytest.raises(UserError, match="misses the tensor"):
            adapters.load_model(tmp_path / "adapter")
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="damaged or not a safetensors file"):
            adapters.load_model(tmp_path / "adapter")
        path.unlink()
        with pytest.raises(UserError, match="holds neither adapter_model"):
            adapters.load_model(tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_config.json").write_text("{")
        with pytest.raises(UserError, match="is not valid JSON"):
            adapters.load_model(tmp_path / "adapter")


FUSED = ("phi3", "glm", "gpt2")


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    ids = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(1))
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "smollm3", "youtu", *FUSED)
ALL, NAMED = ("attention", "ffn"), ("layers.0", "layers.1.ffn.down_proj", "layers.1.attention.o_proj")
OF_PEFT: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "c_fc"]},
    "expression": {"target_modules": r".*\.0\..*(proj|c_attn)"},
    "layers": {"target_modules": ["proj"], "layers_to_transform": [1]},
    "full names": {"target_modules": ["full"]},
    "dora": {"target_modules": ["proj"], "exclude_modules": ["proj2"], "use_dora": True},
}


class TestFamilies:
    def plain(self, tmp_path: Path) -> Any:
        from transformers import AutoModelForCausalLM

        # Youtu's class zeroes the row of a pad token after loading it.
        settings = {"dtype": torch.float32, "pad_token_id": None}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **settings).eval()

    @pytest.mark.parametrize(
        ("family", "targets"),
        [
            *(pytest.param(name, ALL, id=f"{name}-all") for name in FAMILIES),
            *(pytest.param(name, NAMED, id=f"{name}-named") for name in ("qwen3", *FUSED)),
        ],
    )
    def test_peft_computes_what_we_do(self, family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
        from peft import PeftModel

        make(family, tmp_path / "base")
        model = teach(hf.load_model(tmp_path / "base"), "lora", targets=targets)
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        close(logits_of(adapters.load_model(tmp_path / "adapter").eval()), logits_of(model))
        if family in FUSED:
            with pytest.raises((KeyError, ValueError), match="PLMTUNE_LORA"):
                PeftModel.from_pretrained(self.plain(tmp_path), tmp_path / "adapter")
        notes = export_adapter(tmp_path / "adapter", tmp_path / "out")
        assert len(notes) == 1 + (family in FUSED)
        theirs = PeftModel.from_pretrained(self.plain(tmp_path), tmp_path / "out").eval()
        close(logits_of(theirs), logits_of(model))
        close(logits_of(adapters.load_model(tmp_path / "out").eval()), logits_of(model))

    @pytest.mark.parametrize(
        ("family", "chosen"),
        [*((name, "all") for name in FAMILIES), *((name, key) for name in FUSED for key in OF_PEFT if key != "all")],
    )
    def test_we_compute_what_pefts_own_do(self, family: str, chosen: str, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        make(family, tmp_path / "base")
        first, second = ("c_attn", "mlp.c_proj") if family == "gpt2" else ("o_proj", "down_proj")
        layer = "transformer.h.1.attn" if family == "gpt2" else "model.layers.1.self_attn"
        names = {"proj": [first, second], "proj2": [second], "full": [f"{layer}.{first}"]}
        settings = {
            key: next((found for name, found in names.items() if value == [name]), value)
            for key, value in OF_PEFT[chosen].items()
        }
        torch.manual_seed(2)
        model = get_peft_model(self.plain(tmp_path), LoraConfig(r=3, lora_alpha=5, **settings)).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "theirs")
        if chosen == "dora" and family == "gpt2":
            with pytest.raises(UserError, match="has a bias, which dora does not take"):
                adapters.load_model(tmp_path / "theirs")
            return
        close(logits_of(adapters.load_model(tmp_path / "theirs").eval()), logits_of(model))

    @pytest.mark.parametrize("targets", [("attention",), ("attention", "ffn")])
    def test_of_a_deepseeks_ffn_are_not_pefts_and_the_export_says_so(
        self, targets: tuple[str, ...], tmp_path: Path
    ) -> None:
        from peft import PeftModel

        make("deepseek_v3", tmp_path / "base")
        model = teach(hf.load_model(tmp_path / "base"), "lora", targets=targets)
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        notes = export_adapter(tmp_path / "adapter", tmp_path / "out")
        theirs = PeftModel.from_pretrained(self.plain(tmp_path), tmp_path / "out").eval()
        equal = bool((logits_of(theirs) - logits_of(model)).abs().max() < 1e-4)
        assert equal == ("ffn" not in targets) == (not any("PEFT takes the FFN" in note for note in notes))

    def test_dora_of_a_part_of_a_fused_matrix_is_refused_by_name(self, tmp_path: Path) -> None:
        make("phi3", tmp_path / "base")
        model = teach(hf.load_model(tmp_path / "base"), "dora", targets=("q_proj", "ffn"))
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
        with pytest.raises(UserError, match=r"needs all parts of .*qkv_proj, and layers.0.attention.k_proj has none"):
            export_adapter(tmp_path / "adapter", tmp_path / "out")
