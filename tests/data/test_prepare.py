import copy
import gzip
import json
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmtune.data import prepare as module
from plmtune.data import row_files as reading
from plmtune.data.prepare import by_documents, prepare
from plmtune.data.shards import Shards
from plmtune.data.sources import Source, shards
from plmtune.data.text_files import files
from plmtune.errors import UserError
from plmtune.io import spool, terminal
from plmtune.registry import load
from plmtune.tokenizers.tokenizer import Tokenizer
from plmtune.tokenizers.tokenizer_files import load_tokenizer

SHAKESPEARE = Path(__file__).parents[2].parent / "shared/data/pretrain/tinyshakespeare.txt"


class Texts(Source):
    """Documents from a list."""

    name = "texts"

    def __init__(self, *texts, then=None):
        self.texts = texts
        self.then = then

    def documents(self, skip_bad=False):
        yield from self.texts
        if self.then:
            raise self.then

    def fingerprint(self):
        return repr(self.texts)

    def describe(self):
        return f"{len(self.texts)} texts"


@pytest.fixture(scope="module")
def tokenizer():
    return load("tokenizer", "byte")()


def documents_of(split, tokenizer):
    documents = [split.document(index, tokenizer.eos_id).tolist() for index in range(split.num_documents)]
    assert [id for ids in documents for id in ids] == split.read(0, split.num_tokens).tolist()
    return [tokenizer.decode([id for id in ids if id != tokenizer.eos_id]) for ids in documents]


def left_in(root):
    return sorted(path.name for path in root.iterdir())


class TestPrepare:
    def test_every_document_comes_back_in_order_and_once(self, tmp_path, tokenizer):
        texts = [f"document {i} 界\n" * (i % 7 + 1) for i in range(200)]
        opened = Shards.open(prepare(Texts(*texts), tokenizer, tmp_path, holdout=0.2), vocab_size=257)
        train, held = (documents_of(split, tokenizer) for split in (opened.train, opened.validation))
        assert sorted(train + held) == sorted(texts)
        assert [t for t in texts if t in set(train)] == train
        assert 20 <= len(held) <= 60
        counts = opened.manifest.splits["train"]
        assert (counts.documents, counts.bytes) == (len(train), sum(len(t.encode()) for t in train))
        assert counts.tokens == counts.bytes + counts.documents

    def test_a_second_call_finds_the_first(self, tmp_path, tokenizer, monkeypatch):
        first = prepare(Texts("one", "two"), tokenizer, tmp_path)
        monkeypatch.setattr(module, "_write", None)
        assert prepare(Texts("one", "two"), tokenizer, tmp_path) == first

    def test_other_text_settings_or_tokenizers_go_elsewhere(self, tmp_path, tokenizer):
        places = {
            prepare(Texts("one", "two"), tokenizer, tmp_path),
            prepare(Texts("one", "three"), tokenizer, tmp_path),
            prepare(Texts("one", "two"), tokenizer, tmp_path, holdout=0.5),
            prepare(Texts("one", "two"), tokenizer, tmp_path, holdout_by="tail"),
            prepare(Texts("one", "two"), load("tokenizer", "bundled")(), tmp_path),
        }
        assert len(places) == 5
        assert all(place.name.startswith("texts-") and len(place.name) == 6 + 12 for place in places)

    def test_what_an_older_format_made_is_made_again(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(module, "FORMAT", 1)
        old = prepare(Texts("one", "two"), tokenizer, tmp_path)
        monkeypatch.undo()
        new = prepare(Texts("one", "two"), tokenizer, tmp_path)
        assert new != old
        assert Shards.open(new).manifest.format == 2

    def test_damage_is_named_and_not_repaired_silently(self, tmp_path, tokenizer):
        directory = prepare(Texts("one", "two"), tokenizer, tmp_path)
        path = directory / "manifest.json"
        path.write_bytes(path.read_bytes().replace(b'"vocab_size": 257', b'"vocab_size": 256'))
        assert prepare(Texts("one", "two"), tokenizer, tmp_path) == directory
        with pytest.raises(
            UserError, match=f"{path} is damaged: it does not match its own checksum. Delete {directory}"
        ):
            Shards.open(directory)

    def test_shards_are_cut_where_they_are_full(self, tmp_path, tokenizer):
        texts = [f"{i:04d}" for i in range(100)]
        one, many = (Shards.open(prepare(Texts(*texts), tokenizer, tmp_path, shard_tokens=n)) for n in (1 << 20, 64))
        assert [s.tokens for s in many.manifest.splits["train"].shards[:-1]] == [64] * 7
        whole = one.train.read(0, 10**6)
        assert many.train.read(0, 10**6).tolist() == whole.tolist()

    def test_the_directory_carries_its_tokenizer(self, tmp_path, tokenizer):
        directory = prepare(Texts("one", "two"), tokenizer, tmp_path)
        assert load_tokenizer(directory / "tokenizer").fingerprint == tokenizer.fingerprint

    def test_documents_longer_than_a_group_are_whole(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(module, "GROUP", 100)
        texts = ["line of text\n" * 50, "x" * 1234, "short", "a\n\n\n" * 99]
        opened = Shards.open(prepare(Texts(*texts), tokenizer, tmp_path, holdout=0))
        assert documents_of(opened.train, tokenizer) == texts

    def test_rows_skipped_are_counted_in_the_manifest(self, tmp_path, tokenizer):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": 1}\nbroken\n{"text": "two"}\n'))
        source = files((str(path),))
        for by in ("documents", "tail"):
            directory = prepare(source, tokenizer, tmp_path / "out", skip_bad=True, holdout_by=by)
            assert Shards.open(directory).manifest.skipped == 2
        with pytest.raises(UserError, match="line 2"):
            prepare(source, tokenizer, tmp_path / "out")

    def test_what_is_prepared_already_is_taken_as_it_is(self, tmp_path, tokenizer):
        directory = prepare(Texts("one", "two"), tokenizer, tmp_path)
        assert prepare(shards(str(directory)), tokenizer, tmp_path / "other") == directory
        with pytest.raises(UserError, match="made by another tokenizer"):
            prepare(shards(str(directory)), load("tokenizer", "bundled")(), tmp_path / "other")

    def test_vocabularies_beyond_uint16_take_uint32(self, tmp_path, tokenizer):
        wide = copy.copy(tokenizer)
        wide.vocab_size = 1 << 17
        opened = Shards.open(prepare(Texts("one", "two"), wide, tmp_path), vocab_size=1 << 17)
        assert opened.manifest.dtype == "<u4"
        assert sorted(documents_of(opened.train, tokenizer) + documents_of(opened.validation, tokenizer)) in (
            ["e", "on", "two"],
            ["o", "one", "tw"],
        )


class TestLongDocuments:
    @pytest.mark.parametrize("by", ["documents", "tail"])
    @pytest.mark.parametrize("name", ["bundled", "byte", "added"])
    def test_in_pieces_have_the_ids_of_the_whole(self, tmp_path, monkeypatch, name, by):
        made = load("tokenizer", "bundled" if name == "added" else name)()
        if name == "added":
            made = Tokenizer(replace(made.vocabulary, added={" fox": 5000, "\n\n": 5001}))
        text = "".join(
            f"Line {i}: the quick brown fox,  l\u2019\u00e9t\u00e9 \u4f60\u597d {'x' * i}\n\n" for i in range(150)
        )
        (tmp_path / "a.txt").write_text(f"{text}|{text[:70]}|  |")
        for module_, constant, size in ((module, "GROUP", 300), (reading, "_CHUNK", 70), (spool, "MAX_HELD", 1000)):
            monkeypatch.setattr(module_, constant, size)
        source = files((str(tmp_path / "a.txt"),), separator="|")
        opened = Shards.open(prepare(source, made, tmp_path / "out", holdout=0.2 if by == "tail" else 0, holdout_by=by))
        held = opened.train.read(0, 10**6).tolist()
        if by == "tail":
            held += opened.validation.read(0, 10**6).tolist()
            cut = int((len(text) + 70) * 0.8)
            texts = [text[:cut], text[cut:], text[:70]]
        else:
            texts = [text, text[:70]]
        assert [i for i in held if i != made.eos_id] == [i for one in texts for i in made.encode(one)]

    def test_without_a_place_to_cut_them_are_refused_with_the_remedy(self, tmp_path, tokenizer, monkeypatch):
        monkeypatch.setattr(module, "GROUP", 1000)
        monkeypatch.setattr(module, "_MAX_UNCUT", 5000)
        monkeypatch.setattr(reading, "_CHUNK", 700)
        (tmp_path / "a.txt").write_text("x" * 9000)
        with pytest.raises(UserError, match=r"no place to cut it.*--separator"):
            prepare(files((str(tmp_path / "a.txt"),)), load("tokenizer", "bundled")(), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        prepare(files((str(tmp_path / "a.txt"),)), tokenizer, tmp_path / "out")


class TestHoldoutByDocuments:
    def split(self, texts, share):
        found = {"train": [], "validation": []}
        for name, text, _ in by_documents(((text, True) for text in texts), share, Path.cwd()):
            found[name].append(text)
        return found["train"], found["validation"]

    def test_a_document_stays_on_its_side_when_others_come_and_go(self):
        texts = [f"text {i}" for i in range(1000)]
        held = set(self.split(texts, 0.1)[1])
        assert 60 < len(held) < 140
        assert set(self.split(texts[::2], 0.1)[1]) == held & set(texts[::2])

    def test_equal_documents_are_never_on_both_sides(self):
        texts = [f"text {i % 50}" for i in range(1000)]
        train, held = self.split(texts, 0.1)
        assert held
        assert not set(train) & set(held)

    @pytest.mark.parametrize("count", [1, 2, 3, 10])
    def test_of_few_documents_no_more_than_the_share_is_held_out(self, count):
        for start in range(30):
            texts = [f"text number {i}" for i in range(start, start + count)]
            train, (held,) = self.split(texts, 1e-9)
            assert len(held) == 1
            cut = next(text for text in texts if text not in train)
            assert cut[:-1] in train and cut[-1] == held

    def test_the_only_document_is_cut_at_its_tail(self):
        assert self.split(["0123456789"], 0.2) == (["01234567"], ["89"])
        assert self.split(["0123456789"] * 3, 0.2) == (["0123456789"] * 2 + ["0123"], ["456789"])

    @pytest.mark.parametrize("copies", [1, 3])
    def test_there_is_text_to_train_on_whatever_its_hash_is(self, copies):
        for number in range(40):
            text = f"the only document {number}"
            train, held_out = self.split([text] * copies, 0.3)
            assert train[: copies - 1] == [text] * (copies - 1)
            assert train[-1] + "".join(held_out) == text and held_out

    def test_a_share_of_zero_holds_nothing_out(self):
        assert self.split(["a", "b"], 0) == (["a", "b"], [])


class TestHoldoutByTail:
    def test_the_end_of_each_file_is_held_out(self, tmp_path, tokenizer):
        (tmp_path / "a.txt").write_text("0123456789")
        (tmp_path / "b.txt").write_text("ab|cdef|ghijklmnopq|rst")
        source = files((str(tmp_path / "a.txt"), str(tmp_path / "b.txt")), separator="|")
        opened = Shards.open(prepare(source, tokenizer, tmp_path / "out", holdout=0.2, holdout_by="tail"))
        assert documents_of(opened.train, tokenizer) == ["01234567", "ab", "cdef", "ghijklmnop"]
        assert documents_of(opened.validation, tokenizer) == ["89", "q", "rst"]

    def test_tinyshakespeare_is_divided_as_elsewhere(self, tmp_path, tokenizer):
        if not SHAKESPEARE.is_file():
            pytest.skip(f"needs {SHAKESPEARE}")
        text = SHAKESPEARE.read_text()
        directory = prepare(files((str(SHAKESPEARE),)), tokenizer, tmp_path, holdout=0.1, holdout_by="tail")
        opened = Shards.open(directory)
        assert documents_of(opened.train, tokenizer) == [text[: int(len(text) * 0.9)]]
        assert documents_of(opened.validation, tokenizer) == [text[int(len(text) * 0.9) :]]


class TestEnds:
    """Wherever a document is cut, it has one beginning and one end."""

    @settings(max_examples=40, deadline=None)
    @given(
        texts=st.lists(st.text("ab \n界", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=6),
        holdout=st.sampled_from([0, 1e-9, 0.1, 0.5, 0.9]),
        by=st.sampled_from(["documents", "tail"]),
        shard_tokens=st.sampled_from([7, 40, 1000]),
        group=st.integers(1, 40),
        files=st.booleans(),
    )
    def test_every_document_has_one(self, tokenizer, texts, holdout, by, shard_tokens, group, files):
        class Source(Texts):
            def pieces(self, skip_bad=False):
                streams = ([text] for text in self.texts) if files else [self.texts]
                yield from (((text, True) for text in stream) for stream in streams)

        bos = 257
        with_bos = SimpleNamespace(
            **{key: getattr(tokenizer, key) for key in ("eos_id", "encode_batch", "cuts", "save", "decode")},
            vocab_size=258, first_ids=(bos,), fingerprint="with bos",
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "GROUP", group)
            how = {"holdout": holdout, "holdout_by": by, "shard_tokens": shard_tokens}
            try:
                opened = Shards.open(prepare(Source(*texts), with_bos, Path(root), **how))
            except UserError:  # all is held out, of each file by itself
                assert holdout >= 0.5 or (max if files else sum)(map(len, texts)) < 3
                return
            splits = opened.train, opened.validation
            ids = np.concatenate([split.read(0, split.num_tokens) for split in splits])
            assert np.count_nonzero(ids == tokenizer.eos_id) == np.count_nonzero(ids == bos) == len(texts)
            assert opened.manifest.documents == len(texts)
            begun, ended, whole = [], [], []
            for split in splits:
                for index in range(split.num_documents):
                    document = split.document(index, tokenizer.eos_id).tolist()
                    assert document.count(bos) == (document[0] == bos)
                    assert document.count(tokenizer.eos_id) == (document[-1] == tokenizer.eos_id)
                    text = [id for id in document if id not in (bos, tokenizer.eos_id)]
                    to = whole if document[0] == bos and document[-1] == tokenizer.eos_id else ended
                    (begun if document[-1] != tokenizer.eos_id else to).append(text)
            assert len(begun) == len(ended) == len(opened.train.breaks) and not len(opened.validation.breaks)
            whole += [one + other for one, other in zip(begun, ended, strict=True)]
            assert sorted(map(tokenizer.decode, whole)) == sorted(texts)

    def test_their_names_in_a_text_are_none(self, tmp_path):
        bundled = load("tokenizer", "bundled")()
        text = f"one {bundled.decode([bundled.eos_id])} two"
        train = Shards.open(prepare(Texts(text), bundled, tmp_path, holdout=0)).train
        assert np.count_nonzero(train.read(0, train.num_tokens) == bundled.eos_id) == 1


class TestRefused:
    def test_no_text_at_all(self, tmp_path, tokenizer):
        with pytest.raises(UserError, match="0 texts: there is no text to train on"):
            prepare(Texts(), tokenizer, tmp_path)
        (tmp_path / "bad.jsonl").write_text("broken\n")
        with pytest.raises(UserError, match=r"no text to train on \(1 bad row left out\)"):
            prepare(files((str(tmp_path / "bad.jsonl"),)), tokenizer, tmp_path / "out", skip_bad=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]

    @pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
    def test_shares_that_cannot_be(self, tmp_path, tokenizer, holdout):
        with pytest.raises(ValueError, match=rf"holdout \({holdout}\)"):
            prepare(Texts("one"), tokenizer, tmp_path, holdout=holdout)

    def test_a_root_that_is_a_file(self, tmp_path, tokenizer):
        (tmp_path / "root").touch()
        with pytest.raises(UserError, match=f"{tmp_path / 'root'} cannot be written"):
            prepare(Texts("one"), tokenizer, tmp_path / "root")

    def test_a_tokenizer_that_gives_ids_beyond_its_vocabulary(self, tmp_path, tokenizer):
        class Wrong:
            vocab_size, eos_id, first_ids, fingerprint = 50, 0, (), "wrong"
            encode_batch = staticmethod(tokenizer.encode_batch)

        with pytest.raises(ValueError, match=r"id 122, beyond its vocab_size \(50\)"):
            prepare(Texts("zz"), Wrong(), tmp_path)


class TestStopped:
    """By a signal: what is prepared stays, and the next call goes on with it."""

    TEXTS = tuple(f"document {i} " + "of words " * (i % 9) + "\n" for i in range(300))

    class Stopping(Texts):
        """Has the process hear a signal in the middle."""

        def documents(self, skip_bad=False):
            for text in self.texts:
                if self.then == 0:
                    signal.raise_signal(self.signal)
                self.then -= 1
                yield text

    def stopping(self, at, number=signal.SIGTERM):
        source = self.Stopping(*self.TEXTS, then=at)
        source.signal = number
        return source

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(module, "GROUP", 200)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("by", ["documents", "tail"])
    def test_resumes_to_the_same_shards(self, tmp_path, tokenizer, by, number, capfd, monkeypatch):
        how = {"holdout": 0.2, "holdout_by": by, "shard_tokens": 700}
        whole = prepare(Texts(*self.TEXTS), tokenizer, tmp_path / "whole", **how)
        root = tmp_path / "root"
        for at in (100, 250):
            with pytest.raises(SystemExit) as caught:
                # by its tail a file is read twice, first to measure it
                prepare(self.stopping(at + (300 if by == "tail" else 0), number), tokenizer, root, **how)
            assert caught.value.code == 75
            said = capfd.readouterr().err
            assert "keeping what is prepared" in said and f"{root / whole.name}.partial keeps" in said
        encoded = []
        encode = module._encode
        monkeypatch.setattr(module, "_encode", lambda *a: (encoded.append(1), encode(*a)))
        directory = prepare(Texts(*self.TEXTS), tokenizer, root, **how)
        assert left_in(root) == [whole.name] and left_in(directory) == left_in(whole)
        for path in whole.glob("*.*"):
            assert path.read_bytes() == (directory / path.name).read_bytes()
        assert len(encoded) < 20

    def test_before_anything_is_prepared_leaves_nothing(self, tmp_path, tokenizer, capfd):
        with pytest.raises(SystemExit):
            prepare(self.stopping(1), tokenizer, tmp_path / "root")
        assert "keeps" not in capfd.readouterr().err.split("texts:")[1]
        assert not (tmp_path / "root").exists()

    @pytest.mark.parametrize("damage", ["state", "shard", "gone"])
    def test_what_was_kept_and_is_damaged_is_made_again(self, tmp_path, tokenizer, damage, caplog):
        how = {"holdout": 0, "shard_tokens": 1 << 20}
        with pytest.raises(SystemExit):
            prepare(self.stopping(200), tokenizer, tmp_path, **how)
        (partial,) = tmp_path.glob("*.partial")
        path = partial / ("progress.json" if damage == "state" else "train-00000.bin")
        data = bytearray(path.read_bytes())
        data[100] ^= 4
        path.unlink() if damage == "gone" else path.write_bytes(data)
        opened = Shards.open(prepare(Texts(*self.TEXTS), tokenizer, tmp_path, **how))
        assert documents_of(opened.train, tokenizer) == list(self.TEXTS)
        assert "preparing from the beginning" in caplog.text


class TestInterrupted:
    @pytest.mark.parametrize("how", [KeyboardInterrupt(), UserError("a broken line"), MemoryError()])
    def test_nothing_half_written_is_left(self, tmp_path, tokenizer, monkeypatch, how):
        monkeypatch.setattr(module, "GROUP", 10)
        with pytest.raises(type(how)):
            prepare(Texts("some text\n" * 20, then=how), tokenizer, tmp_path)
        assert left_in(tmp_path) == []
        prepare(Texts("some text\n" * 20), tokenizer, tmp_path)

    def test_a_full_disk_is_one_sentence_and_leaves_nothing(self, tmp_path):
        # A limit on the size of files stands in for a full disk; it needs a process of its own.
        code = (
            "import resource, signal, sys\n"
            "from pathlib import Path\n"
            "from plmtune.data.text_files import files\n"
            "from plmtune.data.prepare import prepare\n"
            "from plmtune.registry import load\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "prepare(files((sys.argv[1],)), load('tokenizer', 'byte')(), Path(sys.argv[2]))\n"
        )
        (tmp_path / "a.txt").write_text("some text\n" * 20_000)
        (tmp_path / "out").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.txt"), str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"UserError: {tmp_path / 'out'} cannot be written: File too large" in done.stderr
        assert left_in(tmp_path / "out") == []

    def test_remains_of_a_killed_process_are_cleared_away(self, tmp_path, tokenizer):
        target = prepare(Texts("one", "two"), tokenizer, tmp_path)
        stale = tmp_path / f"{target.name}.partial"
        target.rename(stale)
        assert prepare(Texts("one", "two"), tokenizer, tmp_path) == target
        assert left_in(tmp_path) == [target.name]

    def test_a_directory_without_its_manifest_is_made_again(self, tmp_path, tokenizer):
        target = prepare(Texts("one", "two"), tokenizer, tmp_path)
        (target / "manifest.json").unlink()
        prepare(Texts("one", "two"), tokenizer, tmp_path)
        Shards.open(target)

    def test_two_at_once_do_the_work_once_and_agree(self, tmp_path, tokenizer):
        started, go, readings, made = threading.Event(), threading.Event(), [], []

        class Slow(Texts):
            def documents(self, skip_bad=False):
                readings.append(1)
                started.set()
                go.wait()
                yield from self.texts

        def work():
            made.append(prepare(Slow("one", "two"), tokenizer, tmp_path))

        threads = [threading.Thread(target=work) for _ in range(2)]
        threads[0].start()
        started.wait()
        threads[1].start()
        go.set()
        for thread in threads:
            thread.join()
        assert made[0] == made[1]
        assert len(readings) == 1
        Shards.open(made[0])
        assert left_in(tmp_path) == [made[0].name]


class TestProgress:
    def test_a_line_goes_to_standard_error_alone(self, tmp_path, tokenizer, capsys, monkeypatch):
        monkeypatch.setattr(terminal, "in_place", lambda stream: True)
        prepare(Texts("one " * 50_000), tokenizer, tmp_path, progress=True)
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "0.2 million tokens · 0.2 million characters" in printed.err and "· texts" in printed.err

    def test_without_a_terminal_nothing_is_printed(self, tmp_path, tokenizer, capsys):
        prepare(Texts("one", "two"), tokenizer, tmp_path)
        assert capsys.readouterr() == ("", "")


def test_the_manifest_is_plain_json_for_people(tmp_path, tokenizer):
    manifest = json.loads((prepare(Texts("one", "two"), tokenizer, tmp_path) / "manifest.json").read_text())
    assert manifest["settings"]["holdout"] == 0.01
    assert manifest["source_description"] == "2 texts"
