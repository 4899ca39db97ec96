"""Models, tokenizers and GGUF files of which plmtune once got something wrong, each a folder in ../shared/cases."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from plmtune.cli import main
from plmtune.errors import UserError
from plmtune.models.adapters import load_model
from plmtune.models.gguf import convert
from plmtune.tokenizers.tokenizer_files import load_tokenizer

CASES = Path(__file__).parents[3] / "shared" / "cases" / "inference"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no ../shared/cases")
# A folder; texts and the ids that the `tokenizers` library or transformers give for them.
IDS = {
    "added_in_decoder_only": {"a<extra>b": [64, 379, 65]},
    "added_two_passes": {
        "abcde": [64, 65, 380],
        "<|im_start|>assistant": [377, 64, 82, 82, 72, 82, 83, 64, 77, 83],
    },
    "ignore_merges": {"abcd": [259], "xabcd": [87, 64, 256, 67], "abcd abcd": [259, 220, 64, 256, 67]},
}
# A folder; the greatest and the first four logits of transformers.
LOGITS = {
    "kv_heads_null": (300, [-3.852, 0.996, -1.618, -1.347]),
    "shared_tensor_kept_as_head": (316, [2.822, -2.079, 0.136, -0.197]),
}
# A folder; the words behind its name, the text that the model writes.
WRITTEN = {
    "chat_template_list": (["--chat", "--prompt", "hi", "--max-new-tokens", "6"], "ok"),
    "end_of_generation_config": (["--prompt", "a", "--max-new-tokens", "6"], "bc"),
    "hub_cache_snapshot": (["--prompt", "a", "--max-new-tokens", "8"], "😀x"),
    "temperature_tiny_or_nan": (["--prompt", "a", "--max-new-tokens", "3", "--temperature", "1e-40"], "bc"),
    "think_template": (["--chat", "--prompt", "hi", "--max-new-tokens", "6"], "ok"),
}


def copied(tmp_path: Path, name: str) -> Path:
    """The folder's model where it may be written beside; of a cache the snapshot, links into its blobs."""
    given = Path(shutil.copytree(CASES / name / "in", tmp_path / name))
    if name != "hub_cache_snapshot":
        return given
    snapshot = given / "models--o--m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for number, file in enumerate(files):
        (snapshot / file).symlink_to(Path("../../blobs") / str(number).zfill(40))
    return snapshot


def generate(monkeypatch: pytest.MonkeyPatch, model: Path, *words: str) -> int:
    greedy = [] if "--temperature" in words else ["--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["plmtune", "generate", str(model), *words, *greedy])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


class TestTokenizers:
    @pytest.mark.parametrize("name", IDS)
    def test_ids_are_those_of_the_library(self, tmp_path: Path, name: str) -> None:
        tokenizer = load_tokenizer(copied(tmp_path, name))
        for text, ids in IDS[name].items():
            assert tokenizer.encode(text, specials=name != "ignore_merges") == ids

    def test_a_flag_alone_puts_no_bos_before_a_text(self, tmp_path: Path) -> None:
        assert not load_tokenizer(copied(tmp_path, "bos_flag_true_no_template")).adds_bos


class TestModels:
    @pytest.mark.parametrize("name", LOGITS)
    def test_logits_are_those_of_transformers(self, tmp_path: Path, name: str) -> None:
        model = load_model(copied(tmp_path, name), dtype=torch.float32)
        with torch.no_grad():
            found = model(torch.tensor([[5, 9, 300, 77, 12]]))[0, -1]
        greatest, first = LOGITS[name]
        assert int(found.argmax()) == greatest
        assert found[:4].tolist() == pytest.approx(first, abs=1e-3)

    def test_a_tied_head_that_differs_from_the_embedding_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"lm_head\.weight is another matrix than model\.embed_tokens\.weight"):
            load_model(copied(tmp_path, "tied_head_differs"), dtype=torch.float32)


class TestGguf:
    def test_bos_is_put_where_llama_cpp_puts_it(self, tmp_path: Path) -> None:
        convert(copied(tmp_path, "gguf_llama_bpe_bos") / "m.gguf", tmp_path / "m")
        tokenizer = load_tokenizer(tmp_path / "m")
        assert tokenizer.with_bos(tokenizer.encode("hello world")) == [373, 365, 363]

    def test_a_model_in_parts_is_read_from_its_first(self, tmp_path: Path) -> None:
        parts = copied(tmp_path, "gguf_split_in_two")
        with pytest.raises(UserError, match=r"is part 2 of 2 of a model\. Give the first"):
            convert(parts / "model-00002-of-00002.gguf", tmp_path / "m")
        assert not (tmp_path / "m").exists()
        assert sum(convert(parts / "model-00001-of-00002.gguf", tmp_path / "m").kinds.values()) > 1


class TestWriting:
    @pytest.mark.parametrize("name", WRITTEN)
    def test_ends_where_the_model_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        words, text = WRITTEN[name]
        assert generate(monkeypatch, copied(tmp_path, name), *words) == 0
        assert capsys.readouterr().out == f"{text}\n"

    def test_a_temperature_that_is_no_number_is_a_sentence(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = copied(tmp_path, "temperature_tiny_or_nan")
        assert generate(monkeypatch, model, "--prompt", "a", "--temperature", "nan") == 2
        assert "--temperature: nan is no finite number" in capsys.readouterr().err

    def test_an_output_without_unicode_gets_escapes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with (tmp_path / "out").open("w", encoding="ascii") as out:
            monkeypatch.setattr(sys, "stdout", out)
            done = generate(monkeypatch, copied(tmp_path, "stdout_not_utf8"), "--prompt", "a", "--max-new-tokens", "8")
        assert done == 0
        assert (tmp_path / "out").read_text(encoding="ascii") == "\\U0001f600x" + os.linesep
