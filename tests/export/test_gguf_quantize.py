"""llama.cpp's own quantizer: its types are those that lint predicts, and its failures are reported in its own words."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_plm

from plmtune.errors import UserError
from plmtune.export.gguf_quantize import quantize_gguf
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.lint import QUANTIZED, matrices, stored_type
from plmtune.export.runtimes import open_runtime
from plmtune.models.gguf_file import opened_gguf
from plmtune.models.gguf_layout import STANDARD
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.tokenizer_files import byte


def wide() -> Decoder:
    """Some rows of 256 numbers, some of other widths."""
    return tiny_plm(byte().vocab_size, hidden_dim=512, embed_dim=256, num_layers=1, init_std=0.1).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_gguf(wide(), byte(), tmp_path / "f16.gguf", kind="F16")
    return tmp_path / "f16.gguf"


class TestTypes:
    @pytest.mark.parametrize("kind", ["Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S", "Q6_K", "IQ4_XS", "IQ3_S"])
    def test_are_those_predicted_and_never_smaller(self, kind: str, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        (note,) = quantize_gguf(source, tmp_path / "a.gguf", kind, threads=1)
        config = wide().config
        with opened_gguf(tmp_path / "a.gguf") as file:
            found = {name: file.tensors[_in_file(name)].kind.name for name in matrices(config)}
        predicted = {name: stored_type(kind, size[1], head=name == "tok_embeddings") for name, size in _sizes().items()}
        mix = {"kv_b_proj", "down_proj", "o_proj"}  # what some mixes give more bits
        assert {name: found[name] for name in found if name not in mix} == {
            name: predicted[name] for name in predicted if name not in mix
        }
        assert predicted["o_proj"] != QUANTIZED[kind] and found["up_proj"] == QUANTIZED[kind]
        assert note.startswith("Of its numbers ") and QUANTIZED[kind] in note

    def test_compute_nearly_the_same(self, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("llama_cpp")
        quantize_gguf(source, tmp_path / "a.gguf", "q4_k_m", threads=1)
        assert capfd.readouterr() == ("", "")
        ids = [5, 77, 3, 250, 9, 100]
        with torch.no_grad():
            ours = wide()(torch.tensor([ids]))[0, -1].log_softmax(-1)
        with open_runtime(tmp_path / "a.gguf", prefer="llama_cpp", threads=1) as runtime:
            theirs = runtime.log_probs(ids, 1)[0]
        assert (ours.exp() * (ours - theirs)).sum() < 0.1


def _sizes() -> dict[str, tuple[int, int, int]]:
    return matrices(wide().config)


def _in_file(name: str) -> str:
    owner = {"tok_embeddings": ""}.get(name, "layers.0.attention." if name[0] in "qko" else "layers.0.ffn.")
    return STANDARD.hf(f"{owner}{name}.weight")


class TestRefusals:
    def test_a_failure_quotes_llama_cpp_and_leaves_nothing(self, source: Path, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        data = source.read_bytes().replace(b"general.architecture", b"general.architectura")
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(UserError, match=r"llama.cpp could not make Q4_K_M of .*bad.gguf: .*architecture"):
            quantize_gguf(tmp_path / "bad.gguf", tmp_path / "a.gguf", "Q4_K_M", threads=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gguf", "f16.gguf"]
