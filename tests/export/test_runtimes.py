"""Runtimes say what the model says, whichever program runs it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_plm

from plmtune.errors import UserError
from plmtune.export.diagnosis import log_probs
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.huggingface import export_hf
from plmtune.export.runtimes import InferenceRuntime, open_runtime
from plmtune.models.hf import save_model
from plmtune.modules.decoder import Decoder
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled, byte

IDS = [84, 104, 101, 32, 115, 101, 97, 32, 97, 116, 32, 110, 105, 103, 104, 116, 46]
PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n there<|im_end|>\n<|im_start|>assistant\n"
ASKED = [Message("system", "Be brief."), Message("user", "Hi\n there")]


def small_plm(vocab_size: int) -> Decoder:
    return tiny_plm(vocab_size, mla={"v_head_dim": 16}, hidden_dim=64, embed_dim=32, num_heads=2).eval()


def small_llama() -> Decoder:
    return tiny_llama(bundled().vocab_size, gqa={"head_dim": 16}, hidden_dim=64).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Decoder]]:
    """Each runtime's file of a model, and the model."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), bundled()
    a_plm, a_llama = small_plm(tokenizer.vocab_size), small_llama()
    write_gguf(a_plm, tokenizer, folder / "plm.gguf", kind="F32")
    save_model(a_plm, None, folder / "ours")
    tokenizer.save(folder / "ours")
    export_hf(a_llama, tokenizer, folder / "llama")
    export_hf(a_plm, tokenizer, folder / "deepseek", as_="deepseek")
    return {
        "xllamacpp": (folder / "plm.gguf", a_plm),
        "llama_cpp": (folder / "plm.gguf", a_plm),
        "plmtune": (folder / "ours", a_plm),
        "transformers": (folder / "llama", a_llama),
        "deepseek": (folder / "deepseek", a_plm),
    }


@pytest.fixture(
    scope="module",
    params=["xllamacpp", pytest.param("llama_cpp", marks=pytest.mark.slow), "plmtune", "transformers", "deepseek"],
)
def opened(
    request: pytest.FixtureRequest, files: dict[str, tuple[Path, Decoder]]
) -> Iterator[tuple[InferenceRuntime, Decoder]]:
    package: Any = "transformers" if request.param == "deepseek" else request.param
    pytest.importorskip(package)
    path, model = files[request.param]
    with open_runtime(path, threads=1, prefer=package, exact=True) as runtime:
        yield runtime, model


class TestEachRuntime:
    def test_gives_the_models_log_probabilities_after_each_prefix(
        self, opened: tuple[InferenceRuntime, Decoder]
    ) -> None:
        runtime, model = opened
        assert (runtime.vocab_size, runtime.context) == (model.vocab_size, 64)
        found = runtime.log_probs(IDS, 5)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, log_probs(model, IDS, 5), atol=1e-4, rtol=0)

    def test_writes_what_its_log_probabilities_say_token_by_token(
        self, opened: tuple[InferenceRuntime, Decoder]
    ) -> None:
        runtime, model = opened
        written = runtime.greedy(IDS, 6)
        assert written == log_probs(model, IDS + written[:-1], 6).argmax(-1).tolist()
        assert runtime.start(IDS) == written[0]  # begins anew
        assert runtime.step(written[0]) == written[1]

    def test_has_the_checkpoints_ids_and_prompt(self, opened: tuple[InferenceRuntime, Decoder]) -> None:
        runtime, _ = opened
        text = "def f(x):\n    return 'é 你好'<|endoftext|>"
        assert runtime.encode(text) == bundled().encode(text, specials=True)
        assert runtime.render(ASKED) == PROMPT

    def test_refuses_more_tokens_than_it_has_room_for(self, opened: tuple[InferenceRuntime, Decoder]) -> None:
        runtime, _ = opened
        with pytest.raises(ValueError, match="65 tokens exceed the context of 64"):
            runtime.start([1] * 65)
        with pytest.raises(ValueError, match="3 rows cannot be given for 2 tokens"):
            runtime.log_probs([1, 2], 3)


class TestTimed:
    def test_llama_cpp_writes_by_its_own_loop_with_flash_attention_where_it_can(self, tmp_path: Path) -> None:
        pytest.importorskip("xllamacpp")
        write_gguf(small_llama(), bundled(), tmp_path / "llama.gguf", kind="F16")
        for flash in (None, False, True):
            with open_runtime(tmp_path / "llama.gguf", threads=1, prefer="xllamacpp", flash_attention=flash) as runtime:
                found = runtime.timed(IDS, 64 - len(IDS))  # all that fits
            assert found.prompt > 0 and found.token > 0

    @pytest.mark.parametrize("name", ["plmtune", "xllamacpp"])
    def test_every_token_after_the_first_is_timed(self, name: Any, files: dict[str, tuple[Path, Decoder]]) -> None:
        pytest.importorskip(name)
        with open_runtime(files[name][0], threads=1, prefer=name) as runtime:
            found = runtime.timed(IDS, 5)
        assert found.prompt > 0 and found.token > 0

    def test_flash_attention_is_refused_where_llama_cpp_aborts(self, files: dict[str, tuple[Path, Decoder]]) -> None:
        pytest.importorskip("xllamacpp")
        with pytest.raises(UserError, match=r"the architecture plm, on which llama.cpp aborts with flash attention"):
            open_runtime(files["xllamacpp"][0], prefer="xllamacpp", flash_attention=True)
        with pytest.raises(ValueError, match=r"flash_attention is an option of llama\.cpp"):
            open_runtime(files["plmtune"][0], flash_attention=True)


class TestOpening:
    def test_what_no_runtime_serves_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"There is no .*nowhere"):
            open_runtime(tmp_path / "nowhere")
        (tmp_path / "a.bin").touch()
        with pytest.raises(UserError, match=r"neither a \.gguf nor a \.pte"):
            open_runtime(tmp_path / "a.bin")

    def test_a_damaged_file_is_found_before_llama_cpp_sees_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0")
        with pytest.raises(UserError, match="ends within its header"):
            open_runtime(tmp_path / "a.gguf")

    def test_a_missing_package_is_named_with_its_extra(
        self, files: dict[str, tuple[Path, Decoder]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"needs the package xllamacpp \(extra gguf\)"):
            open_runtime(files["xllamacpp"][0])
        with pytest.raises(UserError, match=r"\(extra transformers\)"):
            open_runtime(files["transformers"][0], prefer="transformers")

    def test_a_runtime_that_does_not_serve_a_file_is_refused(self, files: dict[str, tuple[Path, Decoder]]) -> None:
        with pytest.raises(UserError, match="executorch does not serve"):
            open_runtime(files["plmtune"][0], prefer="executorch")
        with pytest.raises(ValueError, match=r"context \(0\) must be at least 1"):
            open_runtime(files["plmtune"][0], context=0)

    def test_a_model_without_a_template_renders_nothing(self, tmp_path: Path) -> None:
        write_gguf(small_plm(byte().vocab_size), byte(), tmp_path / "a.gguf", kind="F32")
        with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1) as runtime:
            assert runtime.render(ASKED) is None  # where llama.cpp's server would take ChatML
            assert runtime.encode("hi") == byte().encode("hi")
