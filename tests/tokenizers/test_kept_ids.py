"""kept_ids.json: written small, read back exactly, refused where it is damaged or of another tokenizer."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.errors import UserError
from plmtune.io import checksummed_json
from plmtune.tokenizers import kept_ids
from plmtune.tokenizers.compress import Compressor
from plmtune.tokenizers.kept_ids import KeptIds
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import bundled, byte, load_tokenizer

OURS, OTHER = "0" * 32, "f" * 32


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    compressor = Compressor(bundled())
    return compressor.compress(compressor.always)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 600), unique=True, min_size=1))
def test_ids_are_read_as_they_were_written(ids: list[int]) -> None:
    assert kept_ids._ids(kept_ids._runs(ids)) == ids


def test_runs_of_ids_are_short(tmp_path: Path) -> None:
    kept_ids.save(tmp_path, OURS, [KeptIds(OTHER, (*range(256), 300, 299, 500, 501))])
    assert '"0-255 300 299 500-501"' in (tmp_path / kept_ids.FILE).read_text()
    assert kept_ids.read(tmp_path / kept_ids.FILE) == (OURS, (KeptIds(OTHER, (*range(256), 300, 299, 500, 501)),))


@pytest.mark.parametrize(
    ("ids", "said"),
    [("5-3", "'5-3' is no run"), ("0 1 x", "'x' is no run"), ("0-9999999", "no run"), ("3 3", "an id twice")],
)
def test_impossible_ids_are_refused(ids: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / kept_ids.FILE
    checksummed_json.save(path, {"tokenizer": OURS, "kept": [{"original": OTHER, "ids": ids}]})
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged .*{re.escape(said)}"):
        kept_ids.read(path)


def test_a_flipped_bit_is_found(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    path = tmp_path / kept_ids.FILE
    path.write_text(path.read_text().replace("0-255", "0-254"))
    with pytest.raises(UserError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_the_file_of_another_tokenizer_is_refused(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "a")
    byte().save(tmp_path / "b")
    (tmp_path / "a" / kept_ids.FILE).rename(tmp_path / "b" / kept_ids.FILE)
    with pytest.raises(UserError, match=r"kept ids do not fit|belongs to the tokenizer"):
        load_tokenizer(tmp_path / "b")


def test_a_tokenizer_that_replaces_a_compressed_one_leaves_no_file(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    byte().save(tmp_path)
    assert not (tmp_path / kept_ids.FILE).exists()
    assert load_tokenizer(tmp_path).kept == ()


def test_a_tokenizer_refuses_kept_ids_of_another_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="2 kept ids do not fit the tokenizer's 257 tokens"):
        Tokenizer(byte().vocabulary, kept=[KeptIds(OTHER, (0, 1))])
