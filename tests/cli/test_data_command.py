import json

import pytest
from click.testing import CliRunner

from plmtune.cli.data import data
from plmtune.errors import UserError


def run(*arguments):
    """The command's output; mistakes raise UserError as they do for the real command line."""
    result = CliRunner().invoke(data, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def corpus(tmp_path):
    rows = [{"body": f"Document {i} says [bold]hello[/bold].\n" * 5} for i in range(40)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepared(corpus, tmp_path):
    run(
        "prepare",
        corpus,
        "--text-key",
        "body",
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "out",
        "--holdout",
        0.2,
    )
    (directory,) = [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    return directory


class TestPrepare:
    def test_says_what_it_made_and_where(self, corpus, tmp_path):
        out = run("prepare", corpus, "--text-key", "body", "--tokenizer", "byte", "--out", tmp_path / "out")
        assert "held out, 40 documents" in out
        assert str(tmp_path / "out" / "files-") in out

    def test_names_the_columns_that_are_not_read(self, tmp_path):
        rows = [{"text": "One.", "url": "a", "id": 1}, {"text": "Two.", "url": None, "id": 2}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = run("prepare", tmp_path / "a.jsonl", "--tokenizer", "byte", "--holdout", "0", "--out", tmp_path / "out")
        assert "2 documents; columns not used: id (2 rows), url (1 row)\n" in said
        (made,) = (path for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
        assert "columns not used: id (2 rows), url (1 row)" in run("inspect", made)

    def test_counts_bad_rows_when_told_to_skip_them(self, corpus, tmp_path):
        corpus.write_text(corpus.read_text() + "broken\n")
        arguments = [
            "prepare",
            corpus,
            "--text-key",
            "body",
            "--tokenizer",
            "byte",
            "--out",
            tmp_path / "out",
        ]
        with pytest.raises(UserError, match="line 41 is not JSON"):
            run(*arguments)
        assert "40 documents; 1 bad row left out" in run(*arguments, "--skip-bad")

    def test_a_separator_may_be_written_with_escapes(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
        out = run(
            "prepare",
            tmp_path / "a.txt",
            "--separator",
            r"\n\n",
            "--tokenizer",
            "byte",
            "--out",
            tmp_path / "out",
        )
        assert "3 documents" in out

    def test_a_tokenizer_may_be_a_directory(self, prepared, corpus, tmp_path):
        arguments = ("prepare", corpus, "--text-key", "body", "--out", tmp_path / "out", "--holdout", 0.2)
        assert str(prepared) in run(*arguments, "--tokenizer", prepared / "tokenizer")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Name files, folders or globs to prepare, or --stdlib"),
            (["nowhere.txt"], "There is no file nowhere.txt"),
            (["corpus.jsonl", "--stdlib"], "not both"),
            (["corpus.jsonl", "--tokenizer", "byt"], r"neither a tokenizer's name .* Did you mean byte\?"),
            (["corpus.jsonl", "--tokenizer", "byte"], "line 1 has no key text. Known: body"),
            (["corpus.jsonl", "--tokenizer", "byte", "--holdout", "2"], r"holdout \(2.0\)"),
            (["corpus.jsonl", "--encoding", "utf-9"], "encoding 'utf-9' is unknown"),
            (["mine.yaml", "--holdout", "0.1"], "--holdout goes with files"),
            (["mine.yaml"], "mine.yaml: no such file"),
        ],
    )
    def test_mistakes_are_one_sentence(self, corpus, monkeypatch, arguments, message):
        monkeypatch.chdir(corpus.parent)
        with pytest.raises(UserError, match=message):
            run("prepare", *arguments)
        assert not [
            path for path in corpus.parent.rglob("*") if path.is_file() and path.stat().st_size and path != corpus
        ]

    def test_every_source_of_a_config_is_prepared_as_the_run_would(self, tmp_path, monkeypatch):
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(f"text of {name}\n" * 50)
        (tmp_path / "mine.yaml").write_text(
            "defaults:\n  - override /data: mix\n  - override /tokenizer: byte\n"
            "recipe: pretrain\n"
            "data:\n  sources:\n"
            "    first: {component: files, paths: [a.txt]}\n"
            "    second: {component: files, paths: [b.txt]}\n"
            "preparation: {directory: shards, holdout: 0.5}\n"
        )
        monkeypatch.chdir(tmp_path)
        out = run("prepare", "mine.yaml", "preparation.holdout_by=tail")
        counts = "250 training tokens, 251 held out, 1 documents"
        assert out.splitlines()[::2] == [f"first: {counts}", f"second: {counts}"]
        directory, _ = (tmp_path / "shards").glob("files-*")
        found = "".join(run("inspect", directory, "--document", "0", "--split", s) for s in ("train", "validation"))
        assert found.replace("\n", "").count("text of ") == 50


class TestInspect:
    def test_shows_counts_and_vouches_for_the_shards(self, prepared):
        out = run("inspect", prepared)
        assert "train" in out
        assert "source: corpus.jsonl" in out
        assert "257 rows, <u2" in out
        assert "every shard has its size and hash" in out

    def test_damage_is_an_error_that_names_the_shard(self, prepared):
        path = prepared / "train-00000.bin"
        path.write_bytes(b"\1\0" + path.read_bytes()[2:])
        with pytest.raises(UserError, match=r"train-00000.bin is damaged"):
            run("inspect", prepared)

    def test_a_document_is_printed_as_it_was(self, prepared):
        shown = {run("inspect", prepared, "--document", i) for i in range(3)}
        assert len(shown) == 3
        assert all(text.startswith("Document ") and "says [bold]hello[/bold].\n" in text for text in shown)

    def test_a_window_shows_where_documents_end_and_who_sees_whom(self, prepared):
        plain = run("inspect", prepared, "--window", 0, "--seq-len", 256)
        assert "hello[/bold].\n<|endoftext|>\nDocument" in plain
        drawn = run("inspect", prepared, "--window", 0, "--seq-len", 256, "--mask").removeprefix(plain).splitlines()
        rows, note = drawn[:-1], drawn[-1]
        assert note == "one sign stands for 4 tokens"
        assert [len(row) for row in rows] == [64] * 64
        assert all(row[i] == "█" and "█" not in row[i + 1 :] for i, row in enumerate(rows))
        assert rows[-1].startswith(".")  # the last token does not see the first document

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--document", "99"], r"--document 99: train holds documents 0 to \d+"),
            (["--window", "99999"], r"--window 99999: train holds windows 0 to \d+"),
            (["--mask"], "--mask needs --window"),
            (["--seq-len", "0"], "--seq-len 0"),
        ],
    )
    def test_what_is_not_there(self, prepared, arguments, message):
        with pytest.raises(UserError, match=message):
            run("inspect", prepared, *arguments)
