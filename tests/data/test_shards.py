import json

import numpy as np
import pytest

from plmtune.data import shards as shards_module
from plmtune.data.shards import Shards, dtype_for
from plmtune.errors import UserError


class TestDtype:
    def test_is_the_smallest_that_holds_every_id(self):
        assert dtype_for(65_536) == np.uint16
        assert dtype_for(65_537) == np.uint32

    @pytest.mark.parametrize("vocab_size", [65_536, 65_537])
    def test_the_highest_id_comes_back(self, make_shards, vocab_size):
        made = make_shards("a", [5, vocab_size - 1, 0], vocab_size=vocab_size)
        opened = Shards.open(made.directory, vocab_size=vocab_size)
        assert opened.train.read(0, 3).tolist() == [5, vocab_size - 1, 0]
        assert (made.directory / "train-00000.bin").stat().st_size == 3 * dtype_for(vocab_size).itemsize


class TestSplit:
    def test_windows_make_every_token_but_the_first_a_target_once(self, make_shards):
        train = make_shards("a", range(31)).train
        assert train.num_windows(10) == 3
        windows = [train.window(i, 10) for i in range(3)]
        assert all(w.dtype == np.int64 and w.size == 11 for w in windows)
        assert [t for w in windows for t in w[1:].tolist()] == list(range(1, 31))

    def test_the_last_window_needs_its_last_target(self, make_shards):
        train = make_shards("a", range(30)).train
        assert train.num_windows(10) == 2
        with pytest.raises(IndexError, match=r"window 2 of 2"):
            train.window(2, 10)

    @pytest.mark.parametrize("shard_tokens", [1, 3, 7, 10])
    def test_windows_span_shard_files(self, make_shards, shard_tokens):
        one, many = make_shards("one", range(50)), make_shards("many", range(50), shard_tokens=shard_tokens)
        assert len(many.manifest.splits["train"].shards) == -(-50 // shard_tokens)
        for i in range(one.train.num_windows(12)):
            assert one.train.window(i, 12).tolist() == many.train.window(i, 12).tolist()

    @pytest.mark.parametrize("shard_tokens", [2, 5, 100])
    def test_documents_are_found_by_their_end(self, make_shards, shard_tokens):
        train = make_shards("a", [1, 2, 0, 3, 0, 0, 4, 5, 6, 0], shard_tokens=shard_tokens).train
        found = [train.document(i, 0).tolist() for i in range(train.num_documents)]
        assert found == [[1, 2, 0], [3, 0], [0], [4, 5, 6, 0]]
        with pytest.raises(IndexError, match=r"document 4 of 4"):
            train.document(4, 0)

    def test_an_empty_split_has_nothing(self, make_shards):
        validation = make_shards("a", range(10)).validation
        assert validation.num_windows(1) == 0
        assert validation.read(0, 5).size == 0


class TestOpen:
    @pytest.fixture
    def directory(self, make_shards):
        return make_shards("code", list(range(1, 999)) * 10, range(50), shard_tokens=4000).directory

    def test_what_is_whole_opens(self, directory):
        opened = Shards.open(directory, tokenizer_fingerprint="a tokenizer", vocab_size=1000)
        assert (opened.train.num_tokens, opened.validation.num_tokens) == (9980, 50)

    def test_a_truncated_shard_is_named_with_both_sizes_even_without_reading(self, directory):
        path = directory / "train-00001.bin"
        path.write_bytes(path.read_bytes()[:-2])
        with pytest.raises(UserError, match=r"train-00001.bin is truncated: 7,998 bytes, expected 8,000"):
            Shards.open(directory, verify=False)

    def test_a_shard_that_grew_is_refused(self, directory):
        with (directory / "train-00002.bin").open("ab") as file:
            file.write(b"\0\0")
        with pytest.raises(UserError, match=r"train-00002.bin is too long"):
            Shards.open(directory, verify=False)

    def test_a_missing_shard_is_named(self, directory):
        (directory / "validation-00000.bin").unlink()
        with pytest.raises(UserError, match=r"validation-00000.bin cannot be read"):
            Shards.open(directory, verify=False)

    def test_a_single_flipped_bit_is_found_in_any_place(self, directory):
        path = directory / "train-00002.bin"
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"train-00002.bin is damaged: xxh3 \w+, expected \w+"):
                Shards.open(directory)
        path.write_bytes(whole)
        Shards.open(directory)

    def test_the_message_says_what_to_do(self, directory):
        (directory / "train-00000.bin").write_bytes(b"")
        with pytest.raises(UserError, match=rf"Delete {directory} and run the same command"):
            Shards.open(directory)

    def test_tokens_of_another_tokenizer_are_refused_with_both_fingerprints(self, directory):
        with pytest.raises(UserError, match=r"another tokenizer \(a tokenizer\) than this run's \(mine\)"):
            Shards.open(directory, tokenizer_fingerprint="mine")

    def test_ids_beyond_the_models_vocabulary_are_named_with_their_place(self, directory):
        with pytest.raises(UserError, match=r"train-00000.bin holds id 998 at token 997, .* of 500"):
            Shards.open(directory, vocab_size=500)

    def test_ids_beyond_the_manifests_own_vocabulary_are_refused(self, directory):
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 998}))
        with pytest.raises(UserError, match=r"holds id 998"):
            Shards.open(directory)

    def test_a_directory_without_manifest_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"is no directory of prepared tokens: it has no manifest.json"):
            Shards.open(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"format": 1}', '{"format": 99}'])
    def test_a_damaged_manifest_is_refused(self, directory, text):
        (directory / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"manifest.json .*prepare the data again"):
            Shards.open(directory)

    @pytest.mark.parametrize(
        "change",
        [
            {"dtype": "<u4"},
            {"eos_id": 1000},
            {"eos_id": None},
            {"vocab_size": "many"},
            {"splits": {}},
            {"splits": None},
            {"surprise": 1},
        ],
    )
    def test_a_manifest_that_contradicts_itself_is_refused(self, directory, change):
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            Shards.open(directory)

    def test_a_manifest_cannot_name_files_elsewhere(self, directory):
        text = (directory / "manifest.json").read_text()
        (directory / "manifest.json").write_text(text.replace("train-00000.bin", "../code/train-00000.bin"))
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            Shards.open(directory)

    def test_the_fingerprint_is_that_of_the_tokens(self, make_shards):
        one, same, other = make_shards("1", [1, 2]), make_shards("2", [1, 2]), make_shards("3", [1, 3])
        assert one.fingerprint == same.fingerprint != other.fingerprint


class TestLargeCorpora:
    """Beyond a size shards are read once, and again when they change."""

    @pytest.fixture
    def directory(self, make_shards, monkeypatch):
        monkeypatch.setattr(shards_module, "_READ_ALWAYS", 100)
        return make_shards("big", range(1, 900), shard_tokens=300).directory

    def test_only_what_changed_is_read_again(self, directory, monkeypatch):
        read = []
        verify = shards_module._verify_shard
        monkeypatch.setattr(
            shards_module,
            "_verify_shard",
            lambda d, shard, *a: (read.append(shard.file), verify(d, shard, *a)),
        )
        Shards.open(directory)
        Shards.open(directory)
        assert read == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]
        path = directory / "train-00001.bin"
        path.write_bytes(b"\1" * path.stat().st_size)
        with pytest.raises(UserError, match=r"train-00001.bin is damaged"):
            Shards.open(directory)

    def test_a_smaller_vocabulary_is_compared_anew(self, directory):
        Shards.open(directory)
        with pytest.raises(UserError, match=r"holds id 300"):
            Shards.open(directory, vocab_size=300)

    def test_a_broken_record_only_costs_another_reading(self, directory):
        (directory / "verified.json").write_text("[1")
        assert Shards.open(directory).train.num_tokens == 899
        assert set(json.loads((directory / "verified.json").read_text())) >= {"train-00000.bin"}
