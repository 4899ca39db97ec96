"""What plmtune bench reports of our own models and of files."""

import io
import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import plmtune
from plmtune.devices import measure as module
from plmtune.devices import measured_models
from plmtune.devices.measure import measure, measure_here
from plmtune.errors import UserError
from plmtune.models.hf import save_model
from plmtune.models.plm import plm
from plmtune.modules.decoder import Decoder
from plmtune.modules.quantized import Format, install
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import byte


def small() -> Decoder:
    torch.manual_seed(0)
    model: Decoder = plm(
        byte().vocab_size,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=32),
        embed_dim=16,
        num_layers=1,
        num_heads=2,
        max_seq_len=64,
    )
    return model


def save_small(directory: Path) -> Path:
    save_model(small(), None, directory)
    byte().save(directory)
    return directory


class TestMeasureHere:
    def test_bytes_a_token_are_the_weights_and_the_cache(self, tmp_path: Path) -> None:
        model, _ = plmtune.load(save_small(tmp_path / "m"))
        found = measure_here(str(tmp_path / "m"), contexts=[4, 16], new_tokens=2, bandwidth=1e9)
        assert [entry.context for entry in found] == [4, 16]
        assert found[0].weight_bytes == sum(p.nbytes for p in model.parameters())
        assert found[0].cache_bytes == 4 * (16 + 4) * 4  # tokens x (latent + rope key) x fp32, one layer
        for entry in found:
            assert entry.share == pytest.approx(
                (entry.weight_bytes + entry.cache_bytes) * entry.decode / 1e9  # type: ignore[operator]
            )
            assert entry.prefill == pytest.approx(entry.context / entry.first_token)  # type: ignore[operator]
            assert entry.weights == "fp32" and entry.sparse == (0, 1)

    def test_dtype_and_decode_only(self, tmp_path: Path) -> None:
        (found,) = measure_here(
            str(save_small(tmp_path / "m")), contexts=[8], new_tokens=2, dtype="bf16", read_prompt=False, bandwidth=1e9
        )
        assert found.weights == "bf16" and found.first_token is None and found.prefill is None
        assert found.cache_bytes == 8 * 20 * 2

    def test_skipped_zeros_are_not_counted_as_read(self, tmp_path: Path) -> None:
        save_small(tmp_path / "m")
        (dense,), (sparse,) = (
            measure_here(str(tmp_path / "m"), contexts=[8], new_tokens=2, sparse=how, bandwidth=1e9)  # type: ignore[arg-type]
            for how in ("off", "on")
        )
        assert sparse.sparse == (1, 1)
        assert 0 < dense.weight_bytes - sparse.weight_bytes < 32 * 16 * 4  # type: ignore[operator]

    def test_a_cache_that_is_filled_holds_the_sample_over_and_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(measured_models, "SAMPLE", 5)
        torch.manual_seed(0)
        sample = [3, 1, 4, 1, 5, 9, 2, 6]
        ours = measured_models.PyTorchModel(small().eval(), 64, "off", sample)
        ours.fill(13)
        with torch.inference_mode():
            read = ours.opened.model.new_cache(1, 5)
            ours.opened.model(torch.tensor([sample[:5]]), cache=read)
        (filled,), (expected,) = ours.opened.cache.layers[0], read.layers[0]
        torch.testing.assert_close(filled[:, :, :13], expected.repeat(1, 1, 3, 1)[:, :, :13])
        assert ours.opened.cache.length == 13
        # A prompt is the sample, too.
        assert ours.prompt(10) == [3, 1, 4, 1, 5, 9, 2, 6, 3, 1]

    def test_the_matrix_that_absorbed_decoding_reads_and_biases_count(self) -> None:
        model = small().to(torch.bfloat16)
        floats = sum(p.nbytes for p in model.parameters())
        attention = model.layers[0].attention
        install(model, {"layers.0.attention.kv_b_proj": Format(8), "layers.0.attention.q_proj": Format(8)})
        model = model.to(torch.bfloat16)
        attention.kv_b_proj.keep_dense()
        attention.q_proj.bias = torch.nn.Parameter(torch.zeros(24, dtype=torch.bfloat16))
        ours = measured_models.PyTorchModel(model.eval(), 64, "off", [1, 2, 3])
        ours.timed(3, 1)
        # q_proj [24, 16] in 8 bits has a scale of 2 bytes a row.
        assert ours.weight_bytes() == floats - 2 * 24 * 16 + 24 * (16 + 2) + 24 * 2

    def test_contexts_that_do_not_fit_are_left_out_and_said(self, tmp_path: Path) -> None:
        said: list[str] = []
        target = str(save_small(tmp_path / "m"))
        (found,) = measure_here(target, contexts=[8, 63], new_tokens=2, bandwidth=1e9, log=said.append)
        assert found.context == 8
        assert any("63 and 2 tokens are more than the 64" in text for text in said)
        with pytest.raises(UserError, match=r"holds 64 tokens, .* shortest context \(100\)"):
            measure_here(target, contexts=[100], new_tokens=2, bandwidth=1e9)

    def test_a_config_is_measured_with_random_weights(self) -> None:
        (found,) = measure_here("model=plm_tiny", contexts=[8], new_tokens=1, bandwidth=1e9)
        assert found.weights == "bf16" and found.decode > 0

    @pytest.mark.parametrize(("target", "words"), [("nowhere", "model=NAME"), ("text.txt", "neither a .gguf nor")])
    def test_what_cannot_be_measured_is_said(
        self, target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text("x")
        with pytest.raises(UserError, match=words):
            measure_here(target, contexts=[8], new_tokens=1, bandwidth=1e9)

    def test_impossible_numbers_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"new_tokens \(0\) must be at least 1"):
            measure("x", contexts=[8], new_tokens=0)
        with pytest.raises(ValueError, match="at least one context"):
            measure("x", contexts=[])


class TestStored:
    def test_a_gguf_reads_its_matrices_and_a_cache_of_keys_and_values(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "plm")
        writer.add_block_count(3)
        writer.add_head_count(4)
        writer.add_embedding_length(64)
        writer.add_key_length(24)
        writer.add_value_length(16)
        writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float16))
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((32, 64), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        weights, cache, form = measured_models._stored(path)
        assert weights == 2 * 64 * (10 + 32)
        assert cache == 2 * 3 * 4 * (24 + 16)
        assert form == "F16"


class TestMeasure:
    def test_bandwidth_is_measured_before_the_targets_process_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []
        monkeypatch.setattr(module, "read_bandwidth", lambda device, **_: 123.0)

        class Pipe(io.StringIO):
            def close(self) -> None:
                asked.append(self.getvalue())

        class Child:
            stdin, stderr = Pipe(), io.StringIO()

            def wait(self) -> int:
                return 1

            def kill(self) -> None:
                pass

        monkeypatch.setattr(subprocess, "Popen", lambda *words, **settings: Child())
        with pytest.raises(UserError, match="ended with 1"):
            measure("m", contexts=[8])
        assert json.loads(asked[0])["bandwidth"] == 123.0

    @pytest.mark.slow
    def test_a_target_has_a_process_of_its_own_whose_mistakes_come_back_in_words(self, tmp_path: Path) -> None:
        said: list[str] = []
        target = str(save_small(tmp_path / "m"))
        (found,) = measure(target, contexts=[8], new_tokens=2, bandwidth=1e9, threads=1, log=said.append)
        assert found.threads == 1 and found.sparse == (0, 1)
        assert found.peak_memory < 2**30
        assert any("context 8" in text for text in said)
        with pytest.raises(UserError, match=r"There is no .*nowhere"):
            measure("nowhere", contexts=[8], bandwidth=1e9)
