"""`plmtune tokenizer`, driven as a person would."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from plmtune.cli.tokenizer import tokenizer
from plmtune.errors import UserError
from plmtune.tokenizers.tokenizer_files import load_tokenizer


def call(*args: object) -> Result:
    result = CliRunner().invoke(tokenizer, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "every", "rat", "你好"]
    lines = [f"{words[i % 12]} {words[i % 7]} {words[i % 5]} {i}" for i in range(80_000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class TestTrain:
    def test_writes_a_tokenizer_and_says_how_well_it_covers_held_out_text(self, text: Path, tmp_path: Path) -> None:
        result = call("train", text, "--vocab-size", 280, "--out", tmp_path / "made")
        assert result.exit_code == 0
        assert "280 tokens" in result.output and "bytes a token on" in result.output
        assert load_tokenizer(tmp_path / "made").vocab_size == 280

    def test_rows_are_read_by_their_key(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"body": f"a cat and a mat {i}"}) + "\n" for i in range(50)))
        result = call("train", rows, "--vocab-size", 262, "--out", tmp_path / "made", "--text-key", "body")
        assert result.exit_code == 0

    def test_more_tokens_than_the_text_holds_leave_nothing_behind(self, text: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"vocab_size \(90000\) is more than"):
            call("train", text, "--vocab-size", 90_000, "--out", tmp_path / "made")
        assert not (tmp_path / "made").exists()

    def test_text_is_named_in_exactly_one_way(self, text: Path, tmp_path: Path) -> None:
        for wrong in ([], [text, "--stdlib"]):
            with pytest.raises(UserError, match="one of the two"):
                call("train", *wrong, "--vocab-size", 300, "--out", tmp_path / "made")

    def test_a_tokenizer_is_not_overwritten(self, text: Path, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="holds a tokenizer already"):
            call("train", text, "--vocab-size", 300, "--out", tmp_path)
        assert (tmp_path / "tokenizer.json").read_text() == "{}"

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none\.txt"):
            call("train", tmp_path / "none.txt", "--vocab-size", 300, "--out", tmp_path / "made")


class TestInspect:
    def test_shows_ids_with_their_pieces(self) -> None:
        lines = call("inspect", "bundled", "def f(你").output.splitlines()
        assert lines[0] == "4,096 tokens in 4,096 rows, end of document 4093"
        assert lines[1].endswith("for 9 bytes")
        assert "'def'" in lines[2]
        assert "b'\\xe4'" in lines[5]  # part of a character

    def test_special_tokens_are_read_on_request(self) -> None:
        assert call("inspect", "bundled", "<|im_end|>", "--specials").output.splitlines()[1].startswith("1 ids")

    def test_a_directory_is_a_name_too(self, tmp_path: Path) -> None:
        load_tokenizer(Path(__file__).parents[2] / "plmtune" / "tokenizers" / "assets").save(tmp_path)
        assert "4,096 tokens" in call("inspect", tmp_path, "x").output

    def test_an_unknown_name_is_refused_with_the_known_ones(self) -> None:
        with pytest.raises(UserError, match=r"bundel is neither a tokenizer's name .* Did you mean bundled\?"):
            call("inspect", "bundel", "x")
