"""`plmtune tokenizer compress`, driven as a person would."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from in_process import run

import plmtune
from plmtune.models.hf import load_model, save_model
from plmtune.models.plm import plm
from plmtune.registry import component
from plmtune.tokenizers.tokenizer_files import bundled, load_tokenizer

Command = Callable[..., tuple[int, str, str]]
ROWS = 4160  # 64 of them padding


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the bundled tokenizer, whose configuration names tokens."""
    directory = tmp_path_factory.mktemp("models") / "big"
    torch.manual_seed(0)
    made = plm(
        ROWS,
        attention=component("attention", "mla", kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
        ffn=component("ffn", "squared_relu", hidden_dim=512),
        embed_dim=16,
        num_layers=8,
        num_heads=2,
        max_seq_len=64,
    )
    save_model(made, None, directory)
    bundled().save(directory)
    config = json.loads((directory / "config.json").read_text())
    named = {"eos_token_id": 4093, "pad_token_id": 4100, "bos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config | named))
    generation = {"eos_token_id": [4093, 4095], "temperature": 0.7, "suppress_tokens": [4094, 5]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{n}(self):\n    return self.value + {n}\n" for n in range(300)))
    return path


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: run(monkeypatch, capsys, "tokenizer", "compress", *words)


class TestCompress:
    def test_a_checkpoint_keeps_the_logits_of_the_tokens_that_stay(
        self, model: Path, text: Path, tmp_path: Path, compress: Command
    ) -> None:
        out = tmp_path / "small"
        code, printed, said = compress(model, text, "--max-embedding-share", 0.05, "--out", out)
        assert (code, said) == (0, "")
        (chosen,) = (line.split() for line in printed.splitlines() if line.endswith("chosen"))
        now = next(line.split() for line in printed.splitlines() if line.endswith("now"))
        assert (chosen[0], now[0]) == ("448", "4,160")
        assert float(chosen[2].rstrip("%")) < 5 < float(now[2].rstrip("%"))
        assert "448 of 4,096 tokens" in printed and "64 padding rows of the model left out" in printed
        assert (out / "vocabulary.png").read_bytes().startswith(b"\x89PNG")

        small, tokenizer = plmtune.load(out, "cpu")
        whole = load_tokenizer(model)
        (kept,) = tokenizer.kept
        ids = list(kept.ids)
        assert kept.original == whole.fingerprint and len(ids) == tokenizer.vocab_size == small.vocab_size == 448
        read = torch.tensor([tokenizer.encode("def f(self):")])
        with torch.no_grad():
            before = load_model(model)(torch.tensor(ids)[read])
            torch.testing.assert_close(small(read), before[..., ids])

        config = json.loads((out / "config.json").read_text())
        assert (config["vocab_size"], config["pad_token_id"]) == (448, None)
        assert ids[config["eos_token_id"]] == 4093
        generation = json.loads((out / "generation_config.json").read_text())
        assert [ids[new] for new in generation["eos_token_id"]] == [4093, 4095]
        assert [ids[new] for new in generation["suppress_tokens"]] == [4094, 5]
        assert generation["temperature"] == 0.7
        assert [ids[new] for new in tokenizer.end_ids] == list(whole.end_ids)

    def test_a_tokenizer_alone_is_compressed_by_coverage(self, text: Path, tmp_path: Path, compress: Command) -> None:
        code, printed, _ = compress("bundled", text, "--coverage", 0.9, "--out", tmp_path / "made")
        assert code == 0 and "embedding" not in printed
        made = load_tokenizer(tmp_path / "made")
        assert made.num_tokens % 64 == 0 and made.kept[0].original == bundled().fingerprint
        written = text.read_text()
        assert made.decode(made.encode(written)) == written


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ((), "Give one of .* none is given"),
            (("--coverage", 0.9, "--vocab-size", 500), "--vocab-size 500 and --coverage 0.9 are given"),
            (("--coverage", 1.01), r"--coverage 1\.01 must be above 0 and at most 1"),
            (("--coverage", 0), r"--coverage 0\.0 must be above 0"),
            (("--max-embedding-share", 1), r"--max-embedding-share 1\.0 must be above 0 and below 1"),
            (("--vocab-size", 258), "258 is below the 259 tokens .* always stay: 256 bytes, 3 special and added"),
            (("--vocab-size", 4096), "4,096 must be below the 4,096 tokens"),
            (("--max-embedding-share", 0.01), r"cannot be reached: the 259 tokens .* have 2\.81% of the parameters"),
            (("--max-embedding-share", 0.9), r"have \d+\.\d% of its parameters as they are. There is nothing to"),
        ],
    )
    def test_numbers_that_cannot_be_are_refused_before_text_is_read(
        self, options: tuple[object, ...], said: str, model: Path, tmp_path: Path, compress: Command
    ) -> None:
        code, printed, error = compress(model, tmp_path / "none.txt", *options, "--out", tmp_path / "out")
        assert (code, printed) == (2, "")
        assert re.search(said, " ".join(error.split())), error
        assert not (tmp_path / "out").exists()

    def test_text_without_a_token_leaves_nothing_behind(self, model: Path, tmp_path: Path, compress: Command) -> None:
        (tmp_path / "blank.txt").write_text(" \n")
        code, _, error = compress(model, tmp_path / "blank.txt", "--coverage", 0.9, "--out", tmp_path / "out")
        assert code == 2 and "there is no text to count" in error
        assert not (tmp_path / "out").exists()

    def test_a_share_needs_a_model(self, text: Path, tmp_path: Path, compress: Command) -> None:
        code, _, error = compress("bundled", text, "--max-embedding-share", 0.2, "--out", tmp_path / "out")
        assert code == 2 and "bundled is a tokenizer without a model" in error

    def test_sequences_of_tokens_in_the_configuration_are_refused(
        self, model: Path, text: Path, tmp_path: Path, compress: Command
    ) -> None:
        (tmp_path / "big").mkdir()
        for path in model.iterdir():
            (tmp_path / "big" / path.name).write_bytes(path.read_bytes())
        (tmp_path / "big" / "generation_config.json").write_text(json.dumps({"bad_words_ids": [[5, 6]]}))
        code, _, error = compress(tmp_path / "big", text, "--coverage", 0.9, "--out", tmp_path / "out")
        assert code == 2 and "key bad_words_ids" in error

    def test_a_model_that_is_there_is_not_replaced(self, model: Path, text: Path, compress: Command) -> None:
        code, _, error = compress(model, text, "--coverage", 0.9, "--out", model)
        assert code == 2 and "holds a model already" in error
