"""A PLM as llama.cpp's deepseek2: its FFN stored as SwiGLU gives the same numbers and comes back."""

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import plmtune
from plmtune.errors import UserError
from plmtune.export.gguf_writer import write_gguf
from plmtune.models.deepseek import deepseek
from plmtune.models.gguf import convert
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_match import match
from plmtune.models.gguf_squared_relu import KEY, Factors, is_copy
from plmtune.models.llama import llama
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte

MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 32}


def tiny(**settings: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "init_std": 0.1} | settings
    model: Decoder = plm(
        byte().vocab_size,
        attention=component("attention", "mla", **MLA),
        ffn=component("ffn", "squared_relu", hidden_dim=96),
        **sizes,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


class TestFiles:
    @pytest.mark.parametrize("tie_embeddings", [True, False])
    def test_come_back_as_the_plm_that_was_written(self, tie_embeddings: bool, tmp_path: Path) -> None:
        model = tiny(tie_embeddings=tie_embeddings)
        write_gguf(model, byte(), tmp_path / "a.gguf", kind="F32", as_="deepseek2")
        with opened_gguf(tmp_path / "a.gguf") as file:
            assert file.metadata["general.architecture"] == "deepseek2"
            assert ("output.weight" in file.tensors) is not tie_embeddings
        convert(tmp_path / "a.gguf", tmp_path / "out")
        loaded, _ = plmtune.load(tmp_path / "out", "cpu")
        for name, numbers in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], numbers), name
        assert loaded.config | {"init_std": 0.1} == model.config

    @pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
    def test_hold_the_numbers_that_a_plms_own_file_holds(self, kind: str, tmp_path: Path) -> None:
        states = []
        for form in (None, "deepseek2"):
            write_gguf(tiny(), byte(), tmp_path / f"{form}.gguf", kind=kind, as_=form)  # type: ignore[arg-type]
            convert(tmp_path / f"{form}.gguf", tmp_path / f"{form}")
            states.append(plmtune.load(tmp_path / f"{form}", "cpu")[0].state_dict())
        for name, numbers in states[0].items():
            if "kv_b_proj" not in name:  # whose blocks lie across
                # Halved, the least numbers of F16 and scales of blocks lose a bit.
                torch.testing.assert_close(states[1][name], numbers, rtol=1e-3 if kind == "Q4_0" else 0, atol=1e-7)

    def test_whose_gate_is_another_matrix_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "a.gguf"
        write_gguf(tiny(), byte(), path, kind="F32", as_="deepseek2")
        with opened_gguf(path) as file:
            place = file.tensors["blk.1.ffn_gate.weight"].start
        data = bytearray(path.read_bytes())
        data[place : place + 4] = struct.pack("<f", 3.0e6)
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"blk.1.ffn_gate.weight is not the copy of blk.1.ffn_up.weight"):
            convert(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "values", [[1.0, 1.0, 1.0], [16384.0, 0.5, 0.25, 2**-6], [3.0, 1.0, 3.0, 1.0], [-1.0, 1.0, -1.0, 1.0], "x", 4]
    )
    def test_with_impossible_factors_are_refused(self, values: Any) -> None:
        with pytest.raises(UserError, match=f"a.gguf: {KEY} is .* must be four powers of two"):
            Factors.read({KEY: values}, Path("a.gguf"))

    def test_of_another_architecture_with_that_key_are_refused(self, tmp_path: Path) -> None:
        write_gguf(tiny(), byte(), tmp_path / "a.gguf", kind="F32", as_="deepseek2")
        data = (tmp_path / "a.gguf").read_bytes().replace(b"deepseek2", b"deepseek3")
        (tmp_path / "a.gguf").write_bytes(data)
        with pytest.raises(UserError, match=r"a key of deepseek2, and general.architecture is 'deepseek3'"):
            convert(tmp_path / "a.gguf", tmp_path / "out")


class TestFactors:
    @pytest.mark.parametrize("size", [2**-7, 0.02, 1.0, 40.0])
    def test_give_the_squared_relu_at_any_size_within_f16(self, size: float) -> None:
        torch.manual_seed(0)
        up, norm = torch.randn(96, 64) * size, torch.rand(64) + 0.5
        found = Factors.choose([(up, norm)])
        assert found == Factors.read({KEY: found.values}, Path("a"))
        assert found.gate * up.abs().max() <= 32768
        x = torch.randn(256, 64) * norm
        expected = F.relu(x @ up.T).square()
        h = x * found.norm
        given = F.silu(h @ (up * found.gate).T) * (h @ (up * found.up).T) * found.down
        assert float((given - expected).norm() / expected.norm()) < 1e-5

    def test_ignore_layers_of_zeros(self) -> None:
        zeros = (torch.zeros(8, 4), torch.ones(4))
        other = (torch.randn(8, 4), torch.ones(4))
        assert Factors.choose([zeros, other]) == Factors.choose([other])
        assert Factors.choose([zeros]).gate > 0

    @pytest.mark.parametrize(
        ("kinds", "most"), [(("F32", "F32"), 0.0), (("Q8_0", "Q8_0"), 0.01), (("Q4_K", "Q6_K"), 0.1)]
    )
    def test_a_copy_differs_as_its_types_round(self, kinds: tuple[str, str], most: float) -> None:
        torch.manual_seed(0)
        one = torch.randn(64, 64)
        noise = torch.randn(64, 64)
        assert is_copy(one + most * noise, one, kinds)
        assert not is_copy(one + 3 * (most + 1e-5) * noise, one, kinds)


@pytest.mark.parametrize("make", [llama, deepseek])
def test_other_models_are_refused(make: Any) -> None:
    with torch.device("meta"):
        config = make(64, embed_dim=96, num_layers=1, num_heads=6).config
    with pytest.raises(UserError, match="--as deepseek2 is for a PLM: mla, squared_relu, rms_norm"):
        match(config, "deepseek2")


def test_a_plm_is_its_own_architecture_without_it() -> None:
    assert match(tiny().config).architecture.name == "plm"
    with pytest.raises(UserError, match="Use --as deepseek2 or --to hf --as deepseek"):
        match(tiny(tie_embeddings=False).config)
