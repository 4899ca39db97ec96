import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from plmtune.data import row_readers as module
from plmtune.data.row_readers import find_row_files, read_rows
from plmtune.errors import UserError
from plmtune.tokenizers.message import BadRow


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def read(*paths, **settings):
    return list(read_rows(paths, **settings))


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
        monkeypatch.setattr(module, "MAX_BRACKETS", 1000)
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
