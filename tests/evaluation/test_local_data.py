from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from plmtune.errors import UserError
from plmtune.evaluation.local_data import LocalData

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/eval is absent")

ROWS = [{"question": "1 + 1?", "answer": 2}, {"question": "2 + 2?", "answer": 4}]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def opened(folder: Path, text: str) -> LocalData:
    (folder / "tasks.yaml").write_text(text)
    return LocalData.open(folder)


def rows(data: LocalData, task: str = "sums", split: str = "test") -> list[dict[str, Any]]:
    found = data.dataset(task, [split])
    assert found is not None
    return found[split].to_list()


class TestFiles:
    def test_json_lines_and_an_array_give_the_same_rows(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        (tmp_path / "b.json").write_text(json.dumps(ROWS))
        data = opened(tmp_path, "sums: {test: a.jsonl, train: b.json}")
        assert rows(data) == rows(data, split="train") == ROWS

    def test_parquet_is_read(self, tmp_path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
        assert rows(opened(tmp_path, "sums: {test: a.parquet}")) == ROWS

    def test_a_csv_file_has_its_names_in_its_first_line_or_in_the_map(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('question,answer\n"one, or ""two""?",2\n')
        (tmp_path / "b.csv").write_text('"one, or ""two""?",2\n')
        data = opened(tmp_path, "sums:\n  test: a.csv\n  train: {file: b.csv, names: [question, answer]}\n")
        assert rows(data) == rows(data, split="train") == [{"question": 'one, or "two"?', "answer": "2"}]

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_blank_lines_in_a_csv_file_are_no_rows_and_lines_are_counted_with_them(
        self, tmp_path: Path, end: str
    ) -> None:
        written = ["", "q,p", "1,2", "", '"3', '3",4', "", "", "5", ""]
        (tmp_path / "a.csv").write_text(end.join(written), newline="")
        with pytest.raises(UserError, match=r"a\.csv, line 9 has 1 fields where 2 are named"):
            rows(opened(tmp_path, "sums: {test: a.csv}"))
        (tmp_path / "a.csv").write_text(end.join([*written[:-2], "5,6", ""]), newline="")
        data = opened(tmp_path, "sums: {test: a.csv}")
        assert rows(data) == [{"q": "1", "p": "2"}, {"q": "3\n3", "p": "4"}, {"q": "5", "p": "6"}]
        assert [data.place("sums", "test", index).rpartition(", ")[2] for index in range(4)] == [
            "line 3", "line 5", "line 9", "",
        ]  # fmt: skip

    def test_a_line_end_in_a_csv_field_is_the_same_from_every_system(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(b'question\r\n"two\r\nlines"\r\n"line\xe2\x80\xa8separator"\r\n')
        assert rows(opened(tmp_path, "sums: {test: a.csv}")) == [
            {"question": "two\nlines"},
            {"question": "line\u2028separator"},
        ]

    def test_a_file_in_a_zip_is_as_the_file_itself(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            archive.writestr("deep/a.jsonl", lines(ROWS))
        assert rows(opened(tmp_path, "sums: {test: all.zip/deep/a.jsonl}")) == ROWS

    def test_the_first_of_several_that_is_there_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "b.jsonl").write_text(lines(ROWS))
        data = opened(tmp_path, "sums: {test: [a.jsonl, b.jsonl, c.jsonl]}")
        assert rows(data) == ROWS
        assert data.describe("sums") == f"test: {tmp_path / 'b.jsonl'}"

    def test_paths_of_a_map_are_relative_to_it(self, tmp_path: Path) -> None:
        (tmp_path / "maps").mkdir()
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        (tmp_path / "maps" / "mine.yaml").write_text("sums: {test: ../a.jsonl}")
        assert rows(LocalData.open(tmp_path / "maps" / "mine.yaml")) == ROWS

    def test_splits_that_are_not_asked_for_are_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        (tmp_path / "b.jsonl").write_text("not JSON")
        found = opened(tmp_path, "sums: {test: a.jsonl, train: b.jsonl}").dataset("sums", ["test", "validation"])
        assert found is not None
        assert list(found) == ["test"]


class TestColumns:
    def test_expressions_give_python_values(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines([{"q": "Question: why?", "options": ["x", "y"], "gold": 1}]))
        data = opened(
            tmp_path,
            "sums:\n  test:\n    file: a.jsonl\n    columns:\n"
            "      question: q.removeprefix('Question:').strip()\n"
            "      choices: \"{'text': options, 'label': ['A', 'B']}\"\n"
            "      upper: options | map('upper')\n"
            "      label: gold + 1\n",
        )
        choices = {"text": ["x", "y"], "label": ["A", "B"]}
        assert rows(data) == [{"question": "why?", "choices": choices, "upper": ["X", "Y"], "label": 2}]

    def test_a_placeholder_stands_in_file_and_expressions(self, tmp_path: Path) -> None:
        (tmp_path / "algebra_test.jsonl").write_text(lines(ROWS))
        data = opened(
            tmp_path,
            'exam_{subject}:\n  test: {file: "{subject}_test.jsonl", columns: {q: question, subject: subject}}\n',
        )
        assert rows(data, "exam_algebra")[0] == {"q": "1 + 1?", "subject": "algebra"}
        assert data.dataset("exam_geometry", ["test"]) is None
        assert data.dataset("other", ["test"]) is None

    def test_the_pattern_with_more_text_goes_first_and_an_exact_name_before_both(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c"):
            (tmp_path / f"{name}.jsonl").write_text(lines([{"from": name}]))
        data = opened(
            tmp_path, "exam_{x}: {test: a.jsonl}\nexam_{x}_long: {test: b.jsonl}\nexam_y_long: {test: c.jsonl}\n"
        )
        assert [rows(data, name)[0]["from"] for name in ("exam_z", "exam_z_long", "exam_y_long")] == ["a", "b", "c"]

    def test_a_field_that_is_not_there_is_said_with_file_line_and_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines([{"q": 1}, {"p": 2}]))
        data = opened(tmp_path, "sums: {test: {file: a.jsonl, columns: {question: q + 1}}}")
        with pytest.raises(
            UserError, match=r"a\.jsonl, line 2: the column question \(q \+ 1\).*'q' is undefined.*has p"
        ):
            rows(data)

    @pytest.mark.parametrize("expression", ["''.__class__.__mro__", "q.__init__.__globals__", "'x' * 10 ** 12"])
    def test_expressions_do_not_reach_python(self, tmp_path: Path, expression: str) -> None:
        (tmp_path / "a.jsonl").write_text(lines([{"q": 1}]))
        data = opened(tmp_path, f'sums: {{test: {{file: a.jsonl, columns: {{question: "{expression}"}}}}}}')
        with pytest.raises(UserError, match="cannot be made"):
            rows(data)


class TestRows:
    """Rows of a file that holds several splits, and rows that two files share."""

    @pytest.mark.parametrize(
        "where",
        ["{split: test}", "{split: [test, tests]}", "\"split == 'test'\"", "{split: test, n: [2, 3]}", "n is even"],
    )
    def test_those_that_where_names_are_read_and_no_others(self, tmp_path: Path, where: str) -> None:
        held = [{"split": ("train", "test")[n % 2 == 0], "n": n} for n in range(1, 4)]
        (tmp_path / "a.jsonl").write_text(lines(held))
        (tmp_path / "a.csv").write_text("split,n\n" + "".join(f"{one['split']},{one['n']}\n" for one in held))
        data = opened(tmp_path, f"sums: {{test: {{file: a.jsonl, where: {where}}}}}")
        assert rows(data) == [{"split": "test", "n": 2}]
        assert data.place("sums", "test", 0).endswith("a.jsonl, line 2")
        if "even" not in where:  # the values of a CSV file are texts
            assert rows(opened(tmp_path, f"sums: {{test: {{file: a.csv, where: {where}}}}}")) == [
                {"split": "test", "n": "2"}
            ]

    def test_columns_are_made_of_those_that_are_left(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines([{"s": "x", "q": None}, {"s": "y", "q": "why"}]))
        data = opened(tmp_path, "sums: {test: {file: a.jsonl, where: {s: y}, columns: {question: q.upper()}}}")
        assert rows(data) == [{"question": "WHY"}]

    @pytest.mark.parametrize(
        ("where", "said"),
        [
            ("{split: dev}", r"a\.jsonl: where .* leaves none of its 2 rows\. It has split: 'train'; split: 'test'"),
            ("{part: test}", r"a\.jsonl, line 1 has no part, which where names\. It has split, n"),
            ("n > 'a'", r"a\.jsonl, line 1: where \(n > 'a'\) cannot be computed: TypeError"),
            ("part == 1", r"a\.jsonl, line 1: where .* cannot be computed: 'part' is undefined"),
            ("n > 9", r"where \(n > 9\) leaves none of its 2 rows"),
            ("n >", r"key sums\.test\.where: 'n >' is no expression"),
            ("[test]", r"key sums\.test\.where: columns with the values of rows to keep"),
            ("{}", r"key sums\.test\.where"),
            ("{split: null}", r"key sums\.test\.where"),
        ],
    )
    def test_a_where_that_cannot_be_is_said(self, tmp_path: Path, where: str, said: str) -> None:
        (tmp_path / "a.jsonl").write_text(lines([{"split": "train", "n": 1}, {"split": "test", "n": 2}]))
        with pytest.raises(UserError, match=said):
            rows(opened(tmp_path, f"sums:\n  test:\n    file: a.jsonl\n    where: {where}\n"))

    def test_of_two_files_stand_beside_each_other(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        (tmp_path / "labels.lst").write_text("0\n1\n")
        (tmp_path / "more.csv").write_text("id\nx\ny\n")
        data = opened(
            tmp_path,
            "sums:\n  test:\n    file: a.jsonl\n    join: [{file: labels.lst, names: [label]}, more.csv]\n"
            "    where: id == 'y'\n    columns: {q: question, label: label | int, id: id}\n",
        )
        assert rows(data) == [{"q": "2 + 2?", "label": 1, "id": "y"}]
        before = data.fingerprint("sums")
        (tmp_path / "labels.lst").write_text("0\n0\n")
        assert data.fingerprint("sums") != before

    @pytest.mark.parametrize(
        ("join", "content", "said"),
        [
            ("b.jsonl", lines(ROWS[:1]), r"a\.jsonl, line 2 is row 2, and .*b\.jsonl has 1"),
            ("b.jsonl", lines(ROWS * 2), r"b\.jsonl, line 3 is row 3, and .*a\.jsonl has 2"),
            ("b.jsonl", lines(ROWS[::-1]), r"a\.jsonl, line 1 and .*b\.jsonl, line 1 are one row, and have two values"),
            ("c.jsonl", "", r"names .*c\.jsonl for sums/test: it is not there"),
            ("{file: b.jsonl, name: [x]}", "", r"join\.name: unknown\. Did you mean names"),
            ("{file: b.jsonl, names: x}", "", r"join\.names: a list"),
            ("5", "", r"key sums\.test\.join: a file"),
            ("{file: b.lst, names: [x, y]}", "1\n", r"b\.lst has a value a line: give the name of one column"),
        ],
    )
    def test_files_that_do_not_belong_together_are_said(
        self, tmp_path: Path, join: str, content: str, said: str
    ) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        for name in ("b.jsonl", "b.lst"):
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=said):
            rows(opened(tmp_path, f"sums: {{test: {{file: a.jsonl, join: {join}}}}}"))

    @shared
    def test_the_example_of_the_documentation_cuts_a_real_file_in_two(self, tmp_path: Path) -> None:
        text = (Path(__file__).parents[2] / "docs" / "evaluation_data.md").read_text()
        begin = text.index("# One file, two splits")
        source = text[begin : text.index("```", begin)]
        data = opened(tmp_path, source.replace("foundry_arc_easy.jsonl", str(SHARED / "foundry_arc_easy.jsonl")))
        held = data.dataset("arc_easy", ["test", "train"])
        assert held is not None
        assert {name: split.num_rows for name, split in held.items()} == {"test": 2276, "train": 100}
        assert data.place("arc_easy", "test", 0).endswith("foundry_arc_easy.jsonl, line 101")


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.jsonl", '{"q": 1}\n{"q": \n', r"a\.jsonl, line 2 is not JSON"),
            ("a.jsonl", '{"q": 1}\n{"p": 1}\n', r"a\.jsonl, line 2 lacks q"),
            ("a.jsonl", '{"q": 1}\n{"q": 1, "p": 1}\n', r"a\.jsonl, line 2 has p besides"),
            ("a.jsonl", '{"q": 1}\n{"q": "text"}\n', r"a\.jsonl: a column has values of different kinds"),
            ("a.jsonl", "\n", r"a\.jsonl holds no rows"),
            ("a.csv", "q,p\n1,2\n3\n", r"a\.csv, line 3 has 1 fields where 2 are named \(q, p\)"),
            ("a.csv", "q,p\n", r"a\.csv holds no rows"),
            ("a.txt", "text", r"a\.txt is a \.txt file"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named_with_its_line(
        self, tmp_path: Path, name: str, content: str, said: str
    ) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=said):
            rows(opened(tmp_path, f"sums: {{test: {name}}}"))
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(UserError, match=said) as error:
            rows(opened(tmp_path, f"sums: {{test: b.zip/{name}}}"))
        assert str(tmp_path / "b.zip") in str(error.value)

    def test_a_damaged_zip_is_said(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", lines(ROWS * 100))
        content = bytearray((tmp_path / "a.zip").read_bytes())
        content[60] ^= 0xFF
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.zip.* is damaged"):
            rows(opened(tmp_path, "sums: {test: a.zip/a.jsonl}"))
        (tmp_path / "a.zip").write_text("no zip")
        with pytest.raises(UserError, match=r"a\.zip is damaged or not a zip file"):
            rows(opened(tmp_path, "sums: {test: a.zip/a.jsonl}"))

    def test_a_file_that_a_person_named_for_a_task_has_to_be_there(self, tmp_path: Path) -> None:
        data = opened(tmp_path, "sums: {test: a.jsonl}")
        with pytest.raises(UserError, match=r"tasks\.yaml names .*a\.jsonl for sums/test: it is not there"):
            data.check("sums")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("sums: {test: [}", r"line 1: not YAML"),
            ("- sums", r"a map is task: \{split: file\}"),
            ("sums: a.jsonl", r"key sums: name its splits"),
            ("sums: {test: 3}", r"key sums\.test: give a file"),
            ("sums: {test: {fil: a}}", r"key sums\.test: give a file"),
            ("sums: {test: {file: a, colums: {}}}", r"key sums\.test\.colums: unknown\. Did you mean columns"),
            ("sums: {test: {file: a, columns: {x: 3}}}", r"key sums\.test\.columns: each column with an expression"),
            ("sums: {test: {file: a, columns: {x: a +}}}", r"key sums\.test\.columns\.x: 'a \+' is no expression"),
            ("sums: {test: {file: a, names: x}}", r"key sums\.test\.names: a list"),
            ("'{a}_{b}': {test: a}", r"a pattern has one placeholder"),
            ("'x_{a}': {test: '{b}.csv'}", r"a placeholder \{b\} that its task has not"),
        ],
    )
    def test_a_wrong_map_is_refused_with_the_key(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(UserError, match=rf"tasks\.yaml.*{said}"):
            opened(tmp_path, text)

    def test_a_data_file_in_place_of_a_map_is_refused_with_an_example(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        with pytest.raises(UserError, match=r"a\.jsonl is a data file: name it in a map.*TASK: \{test: a\.jsonl\}"):
            LocalData.open(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("name", ["none", "none.yaml"])
    def test_what_is_not_there_is_said_to_be_so(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(UserError, match=rf"{name} is not there \(seen from .*Give a folder with data files"):
            LocalData.open(tmp_path / name)

    def test_an_entry_of_nearly_the_name_is_asked_about_and_others_are_not(self, tmp_path: Path) -> None:
        data = opened(tmp_path, "arc_easi: {test: a.jsonl}\nmmlu_anatomy: {test: a.jsonl}\n")
        assert data.nearest("arc_easy").endswith(
            "tasks.yaml has no entry for arc_easy; it has arc_easi. Did you mean that?"
        )
        assert [data.nearest(task) for task in ("mmlu_astronomy", "mmlu_anatomy", "gsm8k")] == ["", "", ""]


class TestFingerprint:
    def test_it_is_of_what_is_read_and_how(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text(lines(ROWS))
        (tmp_path / "moved.jsonl").write_text(lines(ROWS))
        plain = opened(tmp_path, "sums: {test: a.jsonl}").fingerprint("sums")
        assert opened(tmp_path, "sums: {test: moved.jsonl}").fingerprint("sums") == plain
        assert opened(tmp_path, "sums: {test: {file: a.jsonl, columns: {q: question}}}").fingerprint("sums") != plain
        (tmp_path / "a.jsonl").write_text(lines(ROWS[:1]))
        assert opened(tmp_path, "sums: {test: a.jsonl}").fingerprint("sums") != plain


class TestShippedMap:
    def test_the_map_of_the_documentation_is_one(self, tmp_path: Path) -> None:
        page = (Path(__file__).parents[2] / "docs" / "evaluation_data.md").read_text()
        write = page.partition("```yaml\n")[2].partition("```")[0]
        (tmp_path / "virology_test.csv").write_text("Why?,1,2,3,4,C\n")
        (tmp_path / "arc.jsonl").write_text(lines([{"query": "Question: why?", "choices": ["x", "y"], "gold": 1}]))
        write = write.replace("mmlu.zip/data/test/", "").replace("foundry_arc_easy", "arc")
        data = opened(tmp_path, write)
        assert rows(data, "mmlu_virology")[0]["answer"] == 2
        assert rows(data, "arc_easy")[0]["answerKey"] == "B"

    def test_it_serves_the_tasks_whose_files_a_folder_has(self, tmp_path: Path) -> None:
        (tmp_path / "gsm8k_test.jsonl").write_text(lines(ROWS))
        data = LocalData.open(tmp_path)
        assert data.splits("gsm8k") == ("test",)
        assert data.dataset("humaneval", ["test"]) is None
        assert data.absent("humaneval") == ["HumanEval.jsonl"]
        data.check("gsm8k")
        data.check("humaneval")

    @shared
    def test_every_file_of_the_real_folder_has_its_task(self) -> None:
        data = LocalData.open(SHARED)
        sizes = {
            name: {split: len(held) for split, held in (data.dataset(name, ["test", "train", "dev"]) or {}).items()}
            for name in ("gsm8k", "humaneval", "arc_easy", "lambada_openai", "mmlu_virology")
        }
        assert sizes.pop("gsm8k")["test"] == 1319
        assert sizes == {
            "humaneval": {"test": 164},
            "arc_easy": {"test": 2376},
            "lambada_openai": {"test": 5153},
            "mmlu_virology": {"dev": 5, "test": 166},
        }

    @shared
    def test_mmlu_has_the_columns_of_the_hub(self) -> None:
        data = LocalData.open(SHARED)
        first = rows(data, "mmlu_virology")[0]
        assert first == {
            "question": "How many human polyomaviruses are known at present?",
            "subject": "virology",
            "choices": ["100", "1", "10", "unknown"],
            "answer": 0,
        }
        assert data.splits("mmlu_anatomy_generative") == ("dev", "validation", "test")
        assert data.splits("mmlu_pro_biology") == ()
