"""Hugging Face's forms: transformers loads them with no custom code and gives our logits and ids."""

import json
from pathlib import Path

import pytest
import torch
from saved_adapters import save_adapter
from tiny_models import tiny_llama, tiny_plm

from plmtune.errors import UserError
from plmtune.export.huggingface import end_ids, export_adapter, export_hf
from plmtune.models.adapters import load_adapter
from plmtune.models.hf import load_model, save_model
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, install
from plmtune.registry import component, load
from plmtune.tokenizers.builtin_templates import CHATML_TEMPLATE
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

ROWS = 4096


def small_plm(**settings: object) -> Decoder:
    return tiny_plm(
        ROWS, mla={"kv_lora_rank": 16, "qk_nope_head_dim": 8}, hidden_dim=64, embed_dim=32, **settings
    ).eval()


def small_llama(**settings: object) -> Decoder:
    return tiny_llama(ROWS, gqa=settings, hidden_dim=64, embed_dim=32).eval()


def tokenizer() -> Tokenizer:
    held = bundled()
    return Tokenizer(held.vocabulary, eos=held.eos, vocab_size=ROWS, chat_template=held.chat_template)


@torch.no_grad()
def difference(model: Decoder, directory: Path) -> float:
    """The largest in logits between ours and transformers' over a row of tokens."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    ids = torch.randint(ROWS, (2, 40), generator=torch.Generator().manual_seed(1))
    ours = model(ids)
    assert ours.std() > 0.3  # logits that say something
    return float((theirs(ids).logits - ours).abs().max())


class TestDeepseek:
    @pytest.mark.parametrize("tied", [True, False])
    def test_logits_are_ours(self, tmp_path: Path, tied: bool) -> None:
        model = small_plm(tie_embeddings=tied)
        export_hf(model, tokenizer(), tmp_path / "out", as_="deepseek")
        assert difference(model, tmp_path / "out") < 1e-5

    def test_its_activation_is_the_one_that_vllm_and_sglang_take(self, tmp_path: Path) -> None:
        notes = export_hf(small_plm(), tokenizer(), tmp_path / "out", as_="deepseek")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["hidden_act"] == "silu" and config["model_type"] == "deepseek_v3"
        assert config["first_k_dense_replace"] == 2 and config["q_lora_rank"] is None
        assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 100000.0
        # up and embedding a second time, in fp32
        extra = (2 * 64 * 32 + ROWS * 32) * 4
        assert f"{extra / 2**10:.2f} KiB" in notes[0]

    def test_silu_with_a_steep_gate_is_squared_relu_to_3e_8(self) -> None:
        h = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
        steep = torch.nn.functional.silu(4096 * h) * (h / 4096)
        assert (steep - h.relu() ** 2).abs().max() < 3e-8

    def test_float16_has_not_the_range(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="float16 has too small a range"):
            export_hf(small_plm(), tokenizer(), tmp_path / "out", as_="deepseek", dtype=torch.float16)

    def test_another_eps_is_noted(self, tmp_path: Path) -> None:
        model = small_plm(norm=component("norm", "rms_norm", eps=1e-5))
        notes = export_hf(model, tokenizer(), tmp_path / "out", as_="deepseek")
        assert any("eps 1e-05" in note for note in notes)

    def test_a_llama_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="gqa, swiglu, rms_norm"):
            export_hf(small_llama(), tokenizer(), tmp_path / "out", as_="deepseek")
        assert not (tmp_path / "out").exists()


class TestOwnNames:
    def test_a_plm_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        model = small_plm()
        export_hf(model, tokenizer(), tmp_path / "out")
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["model_type"] == "plm" and "plmtune" not in config
        state = load_model(tmp_path / "out").state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_integers_are_written_out(self, tmp_path: Path) -> None:
        model = small_plm()
        name = "layers.0.ffn.up_proj"
        install(model, {name: Format(8), "tok_embeddings": Format(8)})
        for part in (model.get_submodule(name), model.tok_embeddings):
            part.weight.random_(-128, 128)
            part.scales.fill_(2**-9)
        notes = export_hf(model, tokenizer(), tmp_path / "out")
        assert "floating-point" in notes[0]
        state = load_model(tmp_path / "out").state_dict()
        assert torch.equal(state[f"{name}.weight"], model.get_submodule(name).weight * 2**-9)

    def test_a_model_that_is_there_is_kept(self, tmp_path: Path) -> None:
        export_hf(small_plm(), tokenizer(), tmp_path / "out")
        with pytest.raises(UserError, match="--overwrite"):
            export_hf(small_plm(), tokenizer(), tmp_path / "out")


class TestTokenizer:
    def test_transformers_gives_the_same_ids_and_prompt(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer

        ours = tokenizer()
        export_hf(small_plm(), ours, tmp_path / "out", as_="deepseek")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
        for text in ("def f(x):\n    return x  # 12345", "naïve café 你好 👩‍🚀", "", "  \n\t <|im_start|>"):
            assert theirs.encode(text, add_special_tokens=False, split_special_tokens=False) == ours.encode(
                text, specials=True
            )
        assert load_tokenizer(tmp_path / "out").fingerprint == ours.fingerprint
        messages = [{"role": "user", "content": "hi"}]
        prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")

    def test_generation_ends_at_the_turns_end_too(self, tmp_path: Path) -> None:
        ours = tokenizer()
        assert ours.chat_template == CHATML_TEMPLATE
        export_hf(small_plm(), ours, tmp_path / "out")
        ids = json.loads((tmp_path / "out/generation_config.json").read_text())
        assert ids["eos_token_id"] == end_ids(ours) == [ours.eos_id, ours.specials["<|im_end|>"]]

    def test_the_sampling_of_the_checkpoint_is_kept(self, tmp_path: Path) -> None:
        ours = tokenizer()
        held = {"do_sample": True, "temperature": 0.6, "eos_token_id": 7}
        export_hf(small_plm(), ours, tmp_path / "out", generation=held)
        keys = json.loads((tmp_path / "out/generation_config.json").read_text())
        assert keys == held | {
            "bos_token_id": ours.bos_id,
            "eos_token_id": end_ids(ours),
            "pad_token_id": ours.eos_id,
        }


class TestAdapters:
    def test_are_copied_with_their_base_named(self, tmp_path: Path) -> None:
        model = small_plm()
        save_model(model, None, tmp_path / "base")
        load("peft", "lora")(model=model, rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "up_proj"))
        save_adapter(model, tmp_path / "adapters", tmp_path / "base")
        notes = export_adapter(tmp_path / "adapters", tmp_path / "out")
        config = json.loads((tmp_path / "out/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] in notes[0]
        fresh = load_model(tmp_path / "base")
        load_adapter(fresh, tmp_path / "out")
        export_adapter(tmp_path / "adapters", tmp_path / "out")  # replaces adapters, and nothing else
        with pytest.raises(UserError, match="holds something else than adapters"):
            export_adapter(tmp_path / "adapters", tmp_path / "base")
