import logging
import os
import random
import threading

import numpy as np
import pytest

from plmtune.data import shards as shards_module
from plmtune.data.shard_manifest import dtype_for
from plmtune.data.shards import Shards, Windows
from plmtune.errors import UserError
from plmtune.io import checksummed_json


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


def rows_of(made, seq_len):
    return Windows(made, made.train, seq_len, document_mask=False, whole=True)


class TestSplit:
    def test_windows_make_every_token_but_the_first_a_target_once(self, make_shards):
        made = make_shards("a", range(31))
        train = made.train
        assert rows_of(made, 10).num_rows == 3
        windows = [train.read(10 * i, 10 * i + 11) for i in range(3)]
        assert all(w.dtype == np.int64 and w.size == 11 for w in windows)
        assert [t for w in windows for t in w[1:].tolist()] == list(range(1, 31))

    def test_the_last_window_needs_its_last_target(self, make_shards):
        assert rows_of(make_shards("a", range(30)), 10).num_rows == 2

    @pytest.mark.parametrize("shard_tokens", [1, 3, 7, 10])
    def test_windows_span_shard_files(self, make_shards, shard_tokens):
        one, many = make_shards("one", range(50)), make_shards("many", range(50), shard_tokens=shard_tokens)
        assert len(many.manifest.splits["train"].shards) == -(-50 // shard_tokens)
        for i in range(rows_of(one, 12).num_rows):
            assert rows_of(one, 12).row(i).tokens.tolist() == rows_of(many, 12).row(i).tokens.tolist()

    @pytest.mark.parametrize("shard_tokens", [2, 5, 100])
    def test_documents_are_found_by_their_end(self, make_shards, shard_tokens):
        train = make_shards("a", [1, 2, 0, 3, 0, 0, 4, 5, 6, 0], shard_tokens=shard_tokens).train
        found = [train.document(i, 0).tolist() for i in range(train.num_documents)]
        assert found == [[1, 2, 0], [3, 0], [0], [4, 5, 6, 0]]

    @pytest.mark.parametrize("shard_tokens", [1, 2, 5, 100])
    def test_a_document_that_continues_in_the_other_split_stops_at_its_break(self, make_shards, shard_tokens):
        tokens = [1, 2, 0, 3, 4, 5, 0, 6, 7]  # 1 2 0 | 3 | 4 5 0 | 6 7
        train = make_shards("a", tokens, shard_tokens=shard_tokens, breaks=[4, 9]).train
        assert [train.document(i, 0).tolist() for i in range(4)] == [[1, 2, 0], [3], [4, 5, 0], [6, 7]]

    def test_a_window_is_located_in_every_file_that_it_spans(self, make_shards):
        train = make_shards("a", range(100), shard_tokens=30).train
        assert train.locate(0, 11) == [("train-00000.bin", 0, 10)]
        assert train.locate(20, 31) == [("train-00000.bin", 20, 29), ("train-00001.bin", 0, 0)]
        assert train.locate(45, 91) == [
            ("train-00001.bin", 15, 29),
            ("train-00002.bin", 0, 29),
            ("train-00003.bin", 0, 0),
        ]

    @pytest.mark.parametrize("shard_tokens", [4, 30, 1000])
    def test_what_lies_where_a_window_is_located_is_the_window(self, make_shards, shard_tokens):
        made = make_shards("a", range(100), shard_tokens=shard_tokens)
        for index in range(rows_of(made, 9).num_rows):
            found = []
            for file, first, last in made.train.locate(9 * index, 9 * index + 10):
                found += np.fromfile(made.directory / file, "<u2")[first : last + 1].tolist()
            assert found == made.train.read(9 * index, 9 * index + 10).tolist()

    def test_an_empty_split_has_nothing(self, make_shards):
        validation = make_shards("a", range(10)).validation
        assert validation.num_tokens == 0
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

    @pytest.mark.parametrize("name", ["train-00000.bin", "train-00002.bin", "validation-00000.bin"])
    def test_a_flipped_bit_in_a_shard_is_found_and_the_shard_named(self, directory, name):
        path = directory / name
        whole = path.read_bytes()
        draw = random.Random(name)
        for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(20))]:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
            with pytest.raises(UserError, match=rf"Shard {path} is damaged: xxh3 \w+, expected \w+\. Delete"):
                Shards.open(directory)
        path.write_bytes(whole)
        Shards.open(directory)

    @pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin"])
    def test_a_shard_cut_anywhere_is_found_and_named(self, directory, name):
        path = directory / name
        whole = path.read_bytes()
        for length in random.Random(name).sample(range(len(whole)), 20):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=rf"Shard {path} is truncated: {length:,} bytes, expected"):
                Shards.open(directory, verify=False)

    def test_swapped_shards_are_found_and_recognised(self, directory):
        one, other = directory / "train-00000.bin", directory / "train-00001.bin"
        one.rename(directory / "aside")
        other.rename(one)
        (directory / "aside").rename(other)
        with pytest.raises(
            UserError, match=r"train-00000.bin is damaged: .* That is train-00001.bin: were the files swa"
        ):
            Shards.open(directory)

    def test_a_shard_of_another_corpus_is_found(self, directory, make_shards):
        other = make_shards("other", list(range(2, 1000)) * 10, shard_tokens=4000).directory
        (other / "train-00001.bin").rename(directory / "train-00001.bin")
        with pytest.raises(UserError, match=r"train-00001.bin is damaged: xxh3 \w+, expected \w+\. Delete"):
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
        path = directory / "manifest.json"
        path.write_bytes(checksummed_json.dumps({**checksummed_json.loads(path.read_bytes()), "vocab_size": 998}))
        with pytest.raises(UserError, match=r"holds id 998"):
            Shards.open(directory)

    def test_the_fingerprint_is_that_of_the_tokens(self, make_shards):
        one, same, other = make_shards("1", [1, 2]), make_shards("2", [1, 2]), make_shards("3", [1, 3])
        assert one.fingerprint == same.fingerprint != other.fingerprint


class TestLargeCorpora:
    """Beyond a size shards are read once, and again when they change."""

    FILES = ("train-00000.bin", "train-00001.bin", "train-00002.bin")

    @pytest.fixture
    def directory(self, make_shards, monkeypatch):
        monkeypatch.setattr(shards_module, "_READ_ALWAYS", 100)
        return make_shards("big", range(1, 900), shard_tokens=300).directory

    @pytest.fixture
    def read(self, monkeypatch):
        """The shards that are read, in the order of their reading."""
        names = []
        really = shards_module._read_shard
        monkeypatch.setattr(
            shards_module, "_read_shard", lambda d, shard, m: (names.append(shard.file), really(d, shard, m))[1]
        )
        return names

    def test_only_what_changed_is_read_again(self, directory, read):
        Shards.open(directory)
        Shards.open(directory)
        assert read == list(self.FILES)
        path = directory / "train-00001.bin"
        path.write_bytes(b"\1" * path.stat().st_size)
        with pytest.raises(UserError, match=r"train-00001.bin is damaged"):
            Shards.open(directory)
        assert read == [*self.FILES, "train-00001.bin"]

    def test_setting_the_time_of_change_back_hides_nothing(self, directory):
        Shards.open(directory)
        path = directory / "train-00001.bin"
        before = path.stat()
        path.write_bytes(b"\1" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(UserError, match=r"train-00001.bin is damaged"):
            Shards.open(directory)

    def test_a_smaller_vocabulary_is_compared_without_reading(self, directory, read):
        Shards.open(directory)
        with pytest.raises(UserError, match=r"train-00000.bin holds id 300 at token 299, .* of 300"):
            Shards.open(directory, vocab_size=300)
        Shards.open(directory)
        assert read == list(self.FILES)

    def test_a_damaged_record_only_costs_another_reading(self, directory, read):
        Shards.open(directory)
        record = directory / "verified.json"
        record.write_bytes(record.read_bytes().replace(b"899", b"199"))
        assert Shards.open(directory).train.num_tokens == 899
        assert read == [*self.FILES, *self.FILES]
        assert set(checksummed_json.loads(record.read_bytes())) == set(self.FILES)

    def test_an_interrupted_verification_resumes(self, directory, read, monkeypatch):
        counted = shards_module._read_shard

        def interrupted(directory, shard, manifest):
            if shard.file == "train-00002.bin":
                raise KeyboardInterrupt
            return counted(directory, shard, manifest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards_module, "_read_shard", interrupted)
            Shards.open(directory)
        Shards.open(directory)
        assert read == list(self.FILES)

    def test_of_many_processes_one_reads_and_the_others_wait_for_it(self, directory, read, monkeypatch, caplog):
        # Threads stand for processes: the lock belongs to the opened file, not to the process.
        counted = shards_module._read_shard
        reading, waiting = threading.Event(), threading.Event()

        def slow(*arguments):
            reading.set()
            waiting.wait()
            return counted(*arguments)

        class Waiting(logging.Handler):
            def emit(self, record):
                if "waiting for another process that verifies" in record.getMessage():
                    waiting.set()

        monkeypatch.setattr(shards_module, "_read_shard", slow)
        logging.getLogger("plmtune.io.lock").addHandler(handler := Waiting())
        opened = []
        threads = [threading.Thread(target=lambda: opened.append(Shards.open(directory))) for _ in range(3)]
        threads[0].start()
        reading.wait()
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
        logging.getLogger("plmtune.io.lock").removeHandler(handler)
        assert len(opened) == 3
        assert read == list(self.FILES)

    def test_each_process_says_what_is_wrong(self, directory):
        path = directory / "train-00001.bin"
        path.write_bytes(b"\1" * path.stat().st_size)
        for _ in range(2):
            with pytest.raises(UserError, match=r"train-00001.bin is damaged"):
                Shards.open(directory)

    def test_where_nothing_can_be_written_each_start_reads_and_says_so(self, directory, read, monkeypatch, caplog):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        before = sorted(directory.iterdir())
        Shards.open(directory)
        Shards.open(directory)
        assert read == [*self.FILES, *self.FILES]
        assert sorted(directory.iterdir()) == before
        assert f"verifying {directory}: 0.0 GB are read, at each start" in caplog.text
