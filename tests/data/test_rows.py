"""Rows of files and of the hub, and those that are refused."""

import gzip
import json
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from plmtune.data import rows as module
from plmtune.data.rows import Refused, Rows, find_row_files, read_rows
from plmtune.errors import UserError
from plmtune.tokenizers.message import BadRow


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def read(*paths, **settings):
    return list(read_rows(paths, **settings))


class TestRows:
    def test_reads_no_further_than_max_rows(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n')
        assert len(list(Rows([str(path)], max_rows=1))) == 1

    def test_the_fingerprint_changes_with_the_text_and_not_with_the_place(self, tmp_path):
        (tmp_path / "other").mkdir()
        one, moved = (write(tmp_path / name, '{"a": 1}') for name in ("a.jsonl", "other/a.jsonl"))
        before = Rows([str(one)]).fingerprint()
        assert Rows([str(moved)]).fingerprint() == before
        assert Rows([str(one)], max_rows=1).fingerprint() != before
        write(one, '{"a": 2}')
        assert Rows([str(one)]).fingerprint() != before

    def test_rows_of_the_hub_have_their_number_and_split(self, monkeypatch):
        datasets = types.ModuleType("datasets")
        datasets.load_dataset = lambda *_, **__: iter([{"a": 1}, {"a": 2}, {"a": 3}])
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        monkeypatch.setattr("plmtune.data.hub.installed", lambda package: True)
        rows = Rows(hub="some/set", split="test", max_rows=2)
        assert list(rows) == [("some/set, row 1 of test", {"a": 1}), ("some/set, row 2 of test", {"a": 2})]
        assert rows.describe() == "the hub's some/set, test"

    def test_one_of_paths_and_hub_is_needed(self):
        with pytest.raises(UserError, match="paths is empty"):
            Rows()
        with pytest.raises(UserError, match=r"paths \(a.jsonl\) or hub \(some/set\), not both"):
            Rows(paths=["a.jsonl"], hub="some/set")

    @pytest.mark.parametrize("given", [{"subset": "en"}, {"split": "test"}, {"revision": "v1"}])
    def test_what_goes_with_the_hub_is_not_dropped_beside_paths(self, tmp_path, monkeypatch, given):
        (name, value) = next(iter(given.items()))
        with pytest.raises(UserError, match=f"{name}={value} goes with hub"):
            Rows([str(write(tmp_path / "a.jsonl", "{}"))], **given)
        monkeypatch.setattr("plmtune.data.hub.installed", lambda package: True)
        assert Rows(hub="some/set", **given)
        with pytest.raises(UserError, match="encoding=latin-1 goes with paths"):
            Rows(hub="some/set", encoding="latin-1")

    def test_impossible_settings_are_refused(self, tmp_path):
        path = str(write(tmp_path / "a.jsonl", "{}"))
        with pytest.raises(ValueError, match=r"max_rows \(0\)"):
            Rows([path], max_rows=0)
        with pytest.raises(ValueError, match="'martian' is unknown"):
            Rows([path], encoding="martian")


class TestRefused:
    def test_nothing_refused_raises_nothing(self):
        Refused().raise_if_any("Correct it")

    def test_one_error_lists_all_reasons_with_counts_and_first_places(self):
        refused = Refused()
        for line in (3, 5, 9):
            refused.add(f"a.jsonl, line {line}", "has no assistant turn")
        refused.add("a.jsonl, line 4", BadRow("is not JSON"))
        assert len(refused) == 4
        with pytest.raises(UserError) as error:
            refused.raise_if_any("Correct them")
        assert str(error.value).splitlines() == [
            "4 rows cannot be used:",
            "a.jsonl, line 3 has no assistant turn; 2 more like it",
            "a.jsonl, line 4 is not JSON",
            "Correct them",
        ]

    def test_only_the_most_frequent_reasons_are_listed(self):
        refused = Refused()
        for line in range(100):
            refused.add(f"a.jsonl, line {line}", f"is bad in way {line}")
        assert refused.describe().splitlines()[-1] == "92 more for 92 other reasons"
        assert len(refused.describe().splitlines()) == 9

    def test_an_error_has_no_remedy_if_all_rows_are_bad(self):
        refused = Refused()
        refused.add("a.jsonl, line 1", "is not JSON")
        with pytest.raises(UserError, match=r"^the only row cannot be used:\na.jsonl, line 1 is not JSON$"):
            refused.raise_if_any("Leave them out", good=0)
        with pytest.raises(UserError, match=r"^1 row cannot be used:\n.*\nLeave them out$"):
            refused.raise_if_any("Leave them out", good=1)


class TestJson:
    def test_an_array_is_read_row_by_row(self, tmp_path):
        path = write(tmp_path / "a.json", ' [\n{"a": 1} ,\n {"a": "]"}]\n')
        assert read(path) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": "]"})]

    def test_rows_across_the_pieces_of_a_file_are_whole(self, tmp_path, monkeypatch):
        rows = [{"n": i, "text": 'é\\]",' * (i % 7)} for i in range(50)]
        path = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
        for size in (1, 2, 7, 64):
            monkeypatch.setattr("plmtune.data.row_files._CHUNK", size)
            assert [row for _, row in read(path)] == rows

    def test_an_empty_array_has_no_rows(self, tmp_path):
        assert read(write(tmp_path / "a.json", "[ ]")) == []

    def test_a_json_file_without_an_array_is_read_by_lines(self, tmp_path):
        path = write(tmp_path / "a.json", '{"a": 1}\n\n{"a": 2}\n')
        assert read(path) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": 2})]

    def test_a_line_that_is_a_list_holds_messages(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '[{"role": "user"}]\n7\n')
        (_, first), (place, second) = read(path)
        assert first == {"messages": [{"role": "user"}]}
        assert place == f"{path}, line 2"
        assert str(second) == "is a number, not an object"

    def test_a_deeply_nested_row_is_refused(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"a":' + "[" * 900 + "]" * 900 + '}\n{"a":' + "[" * 60 + "]" * 60 + "}\n")
        (_, first), (_, second) = read(path)
        assert str(first) == "is nested deeper than 64 levels"
        assert isinstance(second, dict)

    def test_a_broken_line_is_reported_and_the_next_ones_are_read(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n')
        kinds = [type(row) for _, row in read(path)]
        assert kinds == [dict, BadRow, dict]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('[{"a": 1}, {"a": ', "no JSON array of rows after row 1"),
            ('[{"a": 1} {"a": 2}]', "after row 1: a comma or a closing bracket is missing"),
            ('[{"a": 1}] x', "'x' stands behind the array"),
            ("[" * 100_000, "nested too deeply"),
            ("[" + "9" * 5000 + ", 1]", "4300 digits"),
            ("[1,", "after row 1"),
        ],
    )
    def test_a_broken_array_says_after_which_row(self, tmp_path, text, message):
        with pytest.raises(UserError, match=message):
            read(write(tmp_path / "a.json", text))

    def test_rows_too_large_to_hold_are_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MAX_ROW", 100)
        monkeypatch.setattr("plmtune.data.row_files._CHUNK", 64)
        path = write(tmp_path / "a.json", json.dumps([{"a": 1}, {"a": "x" * 1000}]))
        with pytest.raises(UserError, match="row 2 has more than the 100 characters"):
            read(path)

    def test_a_packed_array_is_read(self, tmp_path):
        path = tmp_path / "a.json.gz"
        path.write_bytes(gzip.compress(b'[{"a": 1}]'))
        assert read(path) == [(f"{path}, row 1", {"a": 1})]


class TestParquet:
    def test_nested_columns_become_lists_and_objects(self, tmp_path):
        rows = [{"messages": [{"role": "user", "content": f"{i}"}], "n": i} for i in range(40)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        places, read_back = zip(*read(tmp_path / "a.parquet"), strict=True)
        assert list(read_back) == rows
        assert places[39] == f"{tmp_path / 'a.parquet'}, row 40"

    def test_a_damaged_file_is_named(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(UserError, match=r"a\.parquet is damaged or not Parquet"):
            read(tmp_path / "a.parquet")

    def test_a_list_of_nulls_that_would_fill_memory_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr("plmtune.data.row_files.MAX_BRACKETS", 1000)
        table = pyarrow.table({"a": pyarrow.array([[None] * 2000, [None]], pyarrow.list_(pyarrow.null()))})
        parquet.write_table(table, tmp_path / "a.parquet")
        (_, first), (_, second) = read(tmp_path / "a.parquet")
        assert isinstance(first, BadRow)
        assert second == {"a": [None]}


class TestFiles:
    def test_a_folder_gives_its_rows_and_not_its_readme(self, tmp_path):
        write(tmp_path / "README.md", "# what this is")
        write(tmp_path / "b.jsonl", '{"b": 1}')
        write(tmp_path / "a.json", '[{"a": 1}]')
        assert [row for _, row in read(tmp_path)] == [{"a": 1}, {"b": 1}]

    def test_files_without_rows_are_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.txt is a \.txt file: rows are read from"):
            read(write(tmp_path / "a.txt", "hello"))
        with pytest.raises(UserError, match="is empty"):
            read(write(tmp_path / "a.jsonl", ""))
        with pytest.raises(UserError, match="There is no file"):
            read(tmp_path / "b.jsonl")
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "a.md", "text")
        with pytest.raises(UserError, match=r"no \.json"):
            read(tmp_path / "folder")

    @pytest.mark.parametrize(
        ("begin", "said"),
        [
            (b"PK\x03\x04", r"is a ZIP archive, as \.zip and \.xlsx files are"),
            (b"\x1f\x8b\x08\x00", r"is packed by gzip"),
            (b"\x28\xb5\x2f\xfd", r"is packed by zstd"),
            (b"PAR1", r"is a Parquet file"),
        ],
    )
    def test_an_archive_is_recognized_by_its_first_bytes(self, tmp_path, begin, said):
        (tmp_path / "rows.data").write_bytes(begin + bytes(20))
        with pytest.raises(UserError, match=rf"rows\.data {said}"):
            find_row_files([tmp_path / "rows.data"])

    def test_an_object_of_several_lines_is_recognized(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps({"prompt": "a"}, indent=1))
        (_, row), *_ = read_rows([tmp_path / "a.json"])
        assert "an object of several lines? One object a line is needed" in str(row)


class TestCsv:
    def test_a_csv_file_named_as_json_lines_is_recognized(self, tmp_path):
        path = tmp_path / "t.jsonl"
        path.write_text("prompt,completion\na,b\n")
        found = [str(row) for _, row in read_rows([path])]
        assert all(text.startswith("is not JSON") and text.endswith("(the file looks like CSV)") for text in found)
        assert len(found) == 2
        path.write_text('{"prompt": "a",}\n{"prompt": "a", "completion": "b"}\n')
        assert "CSV" not in "".join(str(row) for _, row in read_rows([path]) if isinstance(row, BadRow))
