import gzip
import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from plmtune.config import compose
from plmtune.data.text_files import files
from plmtune.errors import UserError


def read(*paths, skip_bad=False, **settings):
    return list(files(tuple(map(str, paths)), **settings).documents(skip_bad))


def json_lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


class TestText:
    def test_a_file_is_a_document(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]

    def test_a_separator_cuts_it_into_documents(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\nmore\n\n\n\nthree")
        assert read(tmp_path / "a.txt", separator="\n\n") == ["one", "two\nmore", "three"]

    @pytest.mark.parametrize(
        "road",
        [
            r'data.separator="\n\n"',
            r"data.separator=\n\n",
            "data.separator='\n\n'",
            r'YAML "\n\n"',
            r"YAML \n\n",
            r"YAML '\n\n'",
        ],
    )
    def test_a_separator_of_line_feeds_means_that_from_every_road(self, road, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
        overlays, overrides = [], ["data=files", f"data.paths=[{tmp_path}/a.txt]"]
        if road.startswith("YAML"):
            (tmp_path / "mine.yaml").write_text(f"data: {{component: files, separator: {road.removeprefix('YAML ')}}}")
            overlays = [str(tmp_path / "mine.yaml")]
        else:
            overrides.append(road)
        source = compose.build("data", compose.compose("pretrain", overlays, overrides).data)
        assert list(source.documents()) == ["one", "two", "three"]

    def test_other_escapes_in_a_separator_are_refused_and_a_backslash_is_two(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\\cut two\ttail")
        assert read(tmp_path / "a.txt", separator="\\\\cut ") == ["one", "two\ttail"]
        assert read(tmp_path / "a.txt", separator="\\t") == ["one\\cut two", "tail"]
        with pytest.raises(ValueError, match=r"holds \\c; "):
            read(tmp_path / "a.txt", separator="\\cut ")

    def test_a_separator_across_a_reading_boundary_still_cuts(self, tmp_path):
        left = "a" * ((1 << 20) - 3)
        (tmp_path / "a.txt").write_text(left + "<end>" + "b")
        assert read(tmp_path / "a.txt", separator="<end>") == [left, "b"]

    def test_characters_across_a_reading_boundary_are_whole(self, tmp_path):
        text = "a" + "界" * 700_000  # 3 bytes each: both boundaries of the 2 MB fall inside one
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert read(tmp_path / "a.txt") == [text]

    @pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb18030"])
    def test_other_encodings_are_read_when_named(self, tmp_path, encoding):
        text = "café\n" if encoding == "latin-1" else "春眠不觉晓\n"
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        assert read(tmp_path / "a.txt", encoding=encoding) == [text]

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
        assert read(tmp_path / "a.txt") == ["hello"]

    def test_line_ends_stay_as_they_are(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a\r\nb\n")
        assert read(tmp_path / "a.txt") == ["a\r\nb\n"]


class TestCompressed:
    @pytest.mark.parametrize("text", ["text of a file\n" * 9, "é" * 2_000_000])
    def test_text_and_jsonl_unpack(self, tmp_path, text):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
        (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": text})))
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(json_lines({"text": text})))
        for name in ("a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"):
            assert read(tmp_path / name) == [text]

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
    def test_several_frames_in_one_file_are_all_read(self, tmp_path, suffix, pack):
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one ") + pack(b"two"))
        assert read(tmp_path / f"a.txt{suffix}") == ["one two"]

    @pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
    def test_a_truncated_or_foreign_file_is_named(self, tmp_path, suffix, pack):
        path = tmp_path / f"a.jsonl{suffix}"
        whole = pack(json_lines(*({"text": f"row {i}"} for i in range(5000))))
        for damaged in (whole[: len(whole) // 2], whole[:-2], b"not packed at all"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path} is damaged or not (gzip|zstd)"):
                read(path, skip_bad=True)

    def test_the_offset_of_a_wrong_byte_is_in_the_unpacked_text(self, tmp_path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"12345\xff"))
        with pytest.raises(UserError, match="byte 5 of the unpacked text is 0xff"):
            read(tmp_path / "a.txt.gz")


class TestJsonLines:
    def test_rows_are_documents_and_blank_lines_nothing(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n  {"text": "\\u754c \xe7\x95\x8c"}')
        assert read(tmp_path / "a.jsonl") == ["one", "界 界"]

    def test_another_key_holds_the_text_when_named(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(json_lines({"content": "one", "text": "two"}))
        assert read(tmp_path / "a.jsonl", text_key="content") == ["one"]

    def test_rows_of_white_space_are_left_out(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(json_lines({"text": ""}, {"text": " \n"}, {"text": "one"}))
        assert read(tmp_path / "a.jsonl") == ["one"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "brok', "is not JSON: Unterminated string"),
            (b"[", "One object a line is needed"),
            (b'["a"]', "is a list, not an object with the key text"),
            (b'{"txt": "a"}', "has no key text. Did you mean txt?"),
            (b'{"text": 5}', "holds a number under text, not text"),
            (b'{"text": null}', "holds nothing under text"),
            (b'{"text": "\xff"}', "is not utf-8 at byte 10 of the line"),
            (b'{"text": "\\ud800"}', "holds half a surrogate pair at character 0"),
            (b"[" * 100_000, "nested too deeply"),
        ],
    )
    def test_a_bad_row_is_named_by_file_and_line_or_counted(self, tmp_path, line, message):
        path = tmp_path / "a.jsonl"
        path.write_bytes(json_lines({"text": "one"}) + b"\n" + line + b"\n" + json_lines({"text": "two"}))
        with pytest.raises(UserError, match=f"{path}, line 3 .*{message.replace('?', '[?]')}.*--skip-bad"):
            read(path)
        source = files((str(path),))
        assert list(source.documents(skip_bad=True)) == ["one", "two"]
        assert source.skipped == 1
        assert list(source.documents(skip_bad=True)) == ["one", "two"]
        assert source.skipped == 1


class TestParquet:
    def test_rows_are_documents(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", [{"text": f"row {i}", "id": i} for i in range(3000)])
        assert read(tmp_path / "a.parquet") == [f"row {i}" for i in range(3000)]

    def test_a_missing_column_is_named_beside_those_there_are(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", [{"texts": "a", "id": 1}])
        with pytest.raises(UserError, match=r"no column text, only texts, id\. Did you mean texts\?"):
            read(tmp_path / "a.parquet", skip_bad=True)

    def test_a_row_without_text_is_named_or_counted(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", [{"text": "one"}, {"text": None}, {"text": "two"}])
        with pytest.raises(UserError, match=r"a.parquet, row 2 holds nothing"):
            read(tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet", skip_bad=True) == ["one", "two"]

    def test_a_damaged_file_is_named(self, tmp_path):
        path = tmp_path / "a.parquet"
        write_parquet(path, [{"text": "row" * i} for i in range(300)])
        whole = path.read_bytes()
        for damaged in (whole[:100], whole[100:], b"PAR1 not at all"):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{path} is damaged or not Parquet"):
                read(path)


class TestFinding:
    def test_folders_are_read_in_the_order_of_names_without_hidden_or_foreign_files(self, tmp_path):
        for name in ("b.txt", "a.md", "sub/c.py", ".hidden.txt", ".git/d.txt", "picture.png", "empty.txt"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("" if name == "empty.txt" else name)
        assert read(tmp_path) == ["a.md", "b.txt", "sub/c.py"]

    def test_globs_are_sorted_and_nothing_is_read_twice(self, tmp_path, monkeypatch):
        for name in ("b.txt", "a.txt", "c.md"):
            (tmp_path / name).write_text(name)
        monkeypatch.chdir(tmp_path)
        assert read("b.txt", "*.txt", "*.md") == ["b.txt", "a.txt", "c.md"]

    def test_a_file_named_like_a_glob_is_read(self, tmp_path):
        (tmp_path / "a[1].txt").write_text("text")
        assert read(tmp_path / "a[1].txt") == ["text"]

    def test_format_overrules_the_suffix(self, tmp_path):
        (tmp_path / "a.data").write_bytes(json_lines({"text": "one"}))
        assert read(tmp_path / "a.data", format="jsonl") == ["one"]
        assert read(tmp_path / "a.data") == ['{"text": "one"}\n']

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("tinyshakespear.txt", r"no file .*Did you mean tinyshakespeare.txt\?"),
            ("nowhere/a.txt", r"There is no file"),
            ("*.jsonl", r"The glob .*\*.jsonl matches no file"),
            ("folder", r"The folder .* holds no text"),
            ("empty.txt", "empty.txt is empty"),
        ],
    )
    def test_what_is_not_there_is_named(self, tmp_path, path, message):
        (tmp_path / "tinyshakespeare.txt").write_text("text")
        (tmp_path / "empty.txt").touch()
        (tmp_path / "folder").mkdir()
        with pytest.raises(UserError, match=message):
            read(tmp_path / path)

    def test_no_paths_at_all(self):
        with pytest.raises(UserError, match="paths is empty"):
            files()

    def test_settings_that_cannot_be(self, tmp_path):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(ValueError, match="encoding 'utf-9' is unknown"):
            read(tmp_path / "a.txt", encoding="utf-9")
        with pytest.raises(UserError, match="a path is empty"):
            read("")
        with pytest.raises(ValueError, match="separator is the empty text"):
            read(tmp_path / "a.txt", separator="")


class TestWrongEncoding:
    def test_the_file_the_byte_and_the_remedy_are_named(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"x" * ((1 << 20) + 7) + "é".encode("latin-1") + b"yz")
        with pytest.raises(UserError, match=rf"{path} is not utf-8: byte 1048583 is 0xe9 .*encoding=latin-1"):
            read(path)

    def test_a_character_cut_off_at_the_end_is_found(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"ab" + "界".encode()[:2])
        with pytest.raises(UserError, match=r"byte 2 is 0xe7 \(unexpected end of data\)"):
            read(tmp_path / "a.txt")


class TestFingerprint:
    def test_follows_the_text_and_how_it_is_read_but_not_the_place(self, tmp_path):
        for folder, text in (("one", "text"), ("two", "text"), ("three", "test")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text(text)
        one, two, three = (files((str(tmp_path / f),)).fingerprint() for f in ("one", "two", "three"))
        cut = files((str(tmp_path / "one"),), separator="x").fingerprint()
        assert one == two
        assert len({one, three, cut}) == 3

    def test_a_large_file_is_known_by_its_ends_and_time(self, tmp_path, monkeypatch):
        import os

        monkeypatch.setattr("plmtune.data.row_files._HASHED_WHOLE", 1000)
        path = tmp_path / "a.txt"
        path.write_bytes(b"a" * (3 << 20))
        os.utime(path, ns=(0, 5))
        source = files((str(path),))
        before = source.fingerprint()
        assert source.fingerprint() == before
        os.utime(path, ns=(0, 6))
        assert source.fingerprint() != before


class TestTables:
    """CSV and TSV: the first line names the columns."""

    ROWS = 'text,id\n"one, or ""two""?",1\n"two\nlines",2\n\n"\u2028",\n'

    def test_a_column_is_read_and_not_the_file_as_prose(self, tmp_path):
        (tmp_path / "a.csv").write_text(self.ROWS, encoding="utf-8")
        assert read(tmp_path / "a.csv") == ['one, or "two"?', "two\nlines"]
        assert read(tmp_path / "a.csv", text_key="id", skip_bad=True) == ["1", "2"]
        assert read(tmp_path / "a.csv", format="text") == [self.ROWS]

    @pytest.mark.parametrize(("name", "sign"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", ","), ("a.tsv.gz", "\t")])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_signs_line_ends_and_encodings_of_many_systems(self, tmp_path, monkeypatch, name, sign, encoding, end):
        monkeypatch.setattr("plmtune.data.row_files._CHUNK", 7)
        data = end.join([f"id{sign}text", f"1{sign}caf\u00e9", f'2{sign}"a{sign}b"', ""]).encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert read(tmp_path / name, encoding=encoding.removesuffix("-sig")) == ["caf\u00e9", f"a{sign}b"]

    def test_a_line_without_an_end_is_not_held(self, tmp_path, monkeypatch):
        monkeypatch.setattr("plmtune.data.row_files.MAX_ROW", 100)
        monkeypatch.setattr("plmtune.data.row_files._CHUNK", 30)
        (tmp_path / "a.csv").write_text("text,b\n" + "x" * 1000)
        with pytest.raises(UserError, match=r"a\.csv, line 2: has more than the 100 bytes that a row can have"):
            read(tmp_path / "a.csv")

    def test_a_byte_of_another_encoding_is_named_by_its_place(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"text,b\n1,2\ncaf\xe9,2\n")
        with pytest.raises(UserError, match=r"a\.csv is not utf-8: byte 14 is 0xe9"):
            read(tmp_path / "a.csv")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("text,text\n1,2\n", r"a\.csv: its first line has to name the columns, each once"),
            (",b\n1,2\n", "its first line has to name the columns"),
            ("text,b\n1,2\n3\n", r"a\.csv, line 3 has 1 fields where 2 columns are named"),
            ("text,b\n1,2\n,4\n", r"a\.csv, line 3 has no key text"),
            ('text,b\n"1"x,2\n', r"a\.csv, line 2 is no row of a table .*quotation mark"),
            ('text,b\n1,"2\n3,4\n', r"a\.csv, line 2 is no row of a table .*quotation mark"),
            ("words,b\n1,2\n", r"line 2 has no key text.*text_key"),
        ],
    )
    def test_what_is_no_row_is_refused(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "a.csv")


class TestWideEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
    @pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
    def test_lines_of_json_are_cut_in_the_text(self, tmp_path, monkeypatch, encoding, chunk):
        monkeypatch.setattr("plmtune.data.row_files._CHUNK", chunk)
        # U+0A0A and U+0D0A hold the bytes of line ends.
        rows = [{"text": f"{sign}{n}"} for n, sign in enumerate("a\u0a0a\u0d0a\u2028\U0001f600")]
        (tmp_path / "a.jsonl").write_bytes(json_lines(*rows).decode().replace("\n", "\r\n").encode(encoding))
        assert read(tmp_path / "a.jsonl", encoding=encoding) == [row["text"] for row in rows]

    def test_what_is_no_row_is_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"))
        with pytest.raises(UserError, match=r"line 1 is not utf-8 at byte 0 .*; it begins as UTF-16 does"):
            read(tmp_path / "a.jsonl")
        (tmp_path / "b.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16")[:-1])
        with pytest.raises(UserError, match=r"b\.jsonl is not utf-16"):
            read(tmp_path / "b.jsonl", encoding="utf-16")
