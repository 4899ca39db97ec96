"""plmtune perplexity, as a person types it."""

import functools
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from in_process import run, save_small
from pyarrow import parquet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("model"), init_std=0.2)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path) -> Command:
    return functools.partial(run, monkeypatch, capsys, "perplexity", checkpoint, "--device", "cpu")


@pytest.fixture
def totals(measure: Command) -> Callable[..., dict[str, float]]:
    def run(*arguments: object) -> dict[str, float]:
        code, out, err = measure("--json", *arguments)
        assert code == 0, err
        total: dict[str, float] = json.loads(out)["total"]
        return total

    return run


Totals = Callable[..., dict[str, float]]


class TestFiles:
    def test_the_same_documents_cost_the_same_in_every_form(self, totals: Totals, tmp_path: Path) -> None:
        texts = ["One document.", "Ein zweites, längeres Dokument.", "三"]
        (tmp_path / "a.txt").write_text("\n--\n".join(texts), encoding="utf-8")
        (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "b.jsonl").read_bytes()))
        parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "d.parquet")
        (tmp_path / "e").mkdir()
        for number, text in enumerate(texts):
            (tmp_path / "e" / f"{number}.txt").write_text(text, encoding="utf-8")
        expected = totals(tmp_path / "a.txt", "--separator", r"\n--\n")
        assert expected["documents"] == 3
        assert expected["tokens"] == expected["bytes"] == sum(len(text.encode()) for text in texts)
        for name in ("b.jsonl", "c.jsonl.gz", "d.parquet", "e"):
            assert totals(tmp_path / name, "--field", "body") == pytest.approx(expected)
        assert totals(tmp_path / "b.jsonl", "--text-key", "body", "--limit-documents", 2)["documents"] == 2

    def test_figures_are_one_another_in_other_units(self, totals: Totals, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("ä" * 100, encoding="utf-8")
        total = totals(file)
        assert total["loss"] == total["nats"] / 200
        assert total["perplexity"] == pytest.approx(math.exp(total["loss"]))
        assert total["bits_per_byte"] == pytest.approx(total["nats"] / math.log(2) / 200)

    def test_a_shorter_stride_shows_each_token_more(self, totals: Totals, tmp_path: Path) -> None:
        file = tmp_path / "a.txt"
        file.write_text("abcdefghij" * 20)
        assert totals(file, "--window", 16)["nats"] != totals(file, "--window", 16, "--stride", 4)["nats"]
        assert totals(file) == totals(file, "--window", 64, "--stride", 64)

    def test_a_table_has_each_file_and_their_sum_and_the_windows(self, measure: Command, tmp_path: Path) -> None:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("some text")
        (tmp_path / "c.txt").write_text(" \n")
        code, out, err = measure(tmp_path, "--stride", 16)
        assert code == 0, err
        header, *rows, last = out.splitlines()
        assert header.split() == ["text", "loss", "perplexity", "bits", "per", "byte", "tokens", "bytes", "documents"]
        assert [row.split()[0].rpartition("/")[2] for row in rows] == ["a.txt", "b.txt", "c.txt", "all"]
        assert rows[0].split()[-3:] == ["9", "9", "1"] and rows[2].split()[1:] == ["-", "-", "-", "0", "0", "0"]
        assert rows[3].split()[1:4] == rows[0].split()[1:4] and rows[3].split()[-3:] == ["18", "18", "2"]
        assert last == "window 64, stride 16 tokens; each token has at least 48 before it in its document"

    def test_bad_rows_can_be_left_out(self, measure: Command, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 3}\n')
        code, out, err = measure(tmp_path / "a.jsonl", "--skip-bad", "--json")
        assert code == 0 and json.loads(out)["total"]["documents"] == 1
        assert "1 bad row left out" in err


class TestMistakes:
    @pytest.mark.parametrize(
        ("content", "arguments", "message"),
        [
            (b"", (), "a.txt is empty. Nothing was measured."),
            (b"\x7fELF\xff\0\0", (), "a.txt looks binary: it holds zero bytes"),
            (b" \n\n", (), "a.txt: there is no text to measure"),
            (b"ab\xff", (), "a.txt is not utf-8: byte 2 is 0xff"),
            (b"ab\xff", (), "name it: --encoding latin-1, utf-16"),
            (b"text", ("--window", 65), "--window 65 is more than the 64 tokens that"),
            (b"text", ("--window", 8, "--stride", 9), "--stride 9 is more than --window 8"),
            (b"text", ("--stride", 65), "--stride 65 is more than --window 64"),
            (b"text", ("--format", "jsonl"), "a.txt, line 1 is not JSON"),
            (b'{"txt": "a"}', ("--format", "jsonl"), "has no key text. Did you mean txt? Choose it with --text-key."),
            (b"text", ("--encoding", "klingon"), "encoding 'klingon' is unknown to Python"),
            (b"text", ("--device", "warp"), "--device warp: unknown. Known: cpu, "),
            (b"text", ("nothing.txt",), "There is no file nothing.txt"),
        ],
    )
    def test_are_one_sentence_and_exit_code_2(
        self, content: bytes, arguments: tuple[object, ...], message: str, measure: Command, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_bytes(content)
        code, out, err = measure(tmp_path / "a.txt", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err

    def test_the_files_beside_one_that_cannot_be_read_are_measured(self, measure: Command, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "b.jsonl").write_text('{"text": 3}')
        (tmp_path / "c.txt").write_text("more")
        code, out, err = measure(tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt", "--json")
        assert code == 2
        assert list(json.loads(out)["files"]) == [str(tmp_path / "a.txt"), str(tmp_path / "c.txt")]
        assert "b.jsonl, line 1 holds a number under text" in err
        assert "Not measured: 1 of 3 files." in err

    def test_files_before_the_checkpoint_are_told_the_order(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "a.txt").write_text("text")
        code, _, err = run(monkeypatch, capsys, "perplexity", tmp_path / "a.txt", checkpoint, "--device", "cpu")
        assert code == 2
        assert "a.txt is no checkpoint, and CHECKPOINT comes first" in err

    def test_a_model_whose_output_is_no_number_is_told_with_the_place(
        self, measure: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from plmtune.models.adapters import load_model

        def broken(*arguments: Any) -> object:
            model = load_model(*arguments)
            model.tok_embeddings.weight.data[ord("Z")] = math.nan
            return model

        monkeypatch.setattr("plmtune.models.adapters.load_model", broken)
        (tmp_path / "a.txt").write_text("aZ")
        code, out, err = measure(tmp_path / "a.txt")
        assert (code, out) == (2, "")
        assert "a.txt: document 1, tokens 0 to 1: the model's output is not a number" in err
