"""Tables fit a terminal of any width without a broken word; a pipe gets all of them."""

import random

import pytest
from rich.cells import cell_len

from plmtune.io.tables import Cell, Column, Table, _readable, fold, numbers

PATH = "exports/of-some-longer-name/plm_150m-20261121-154047-step-00000635-q4_k_m.gguf"


def bench() -> Table:
    figures = {"context": 0, "first token": 3, "decode/s": 0, "peak memory": 2, "of bandwidth": 1}
    table = Table([Column("target", key=True), "runtime", *numbers(figures)], title="what was measured")
    for context in ("128", "2,048"):
        table.add(PATH, "llama.cpp", context, "0.123 s", "1,234.5", "123.45 MiB", "87%")
    return table


class TestWidths:
    @pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
    def test_no_line_is_wider_but_a_path_that_is_and_nothing_is_broken(self, width: int) -> None:
        lines = bench().lines(width)
        assert max(len(line) for line in lines if line.strip() != PATH) <= width
        words = " ".join(lines).split()
        assert PATH in words and words.count("1,234.5") == 2 and "2,048" in words and words.count("llama.cpp") == 2

    @pytest.mark.parametrize("width", [60, 80, 100])
    def test_what_names_rows_stands_above_them_once_where_there_is_no_room_beside(self, width: int) -> None:
        lines = bench().lines(width)
        assert lines.count(PATH) == 1 and lines[lines.index(PATH) + 1].startswith("  llama.cpp")
        assert lines[1].strip() == "target"

    def test_a_last_column_of_prose_stands_below_where_folding_it_would_not_do(self) -> None:
        table = Table([Column("check", folds=True), Column("value", right=True), Column("remark", folds=True)])
        table.add("the largest difference", "0.0001", "of all tokens that are not unlikely")
        assert table.lines(54)[1:] == [
            "the largest difference  0.0001  of all tokens that are",
            "                                not unlikely",
        ]
        assert table.lines(36)[1:] == [
            "  remark",
            "the largest difference  0.0001",
            "  of all tokens that are not",
            "  unlikely",
        ]

    def test_columns_are_dropped_in_their_order_and_named(self) -> None:
        lines = bench().lines(55)
        assert lines[-2].startswith("Not shown in 55 columns: of bandwidth. A wider terminal")
        assert "decode/s" in lines[1] + lines[2] + lines[3] and "bandwidth" not in "".join(lines[:-2])

    def test_what_cannot_fit_becomes_a_list_of_fields_with_every_column(self) -> None:
        lines = bench().lines(25)
        assert "decode/s      1,234.5" in lines and "of bandwidth  87%" in lines
        assert not any(line.startswith("Not shown") for line in lines)

    def test_headings_wrap_before_anything_is_left_out(self) -> None:
        table = Table(numbers({"a heading of words": 1, "another heading": 1}))
        table.add("12345", "67890")
        lines = table.lines(20)
        assert lines[-1].split() == ["12345", "67890"] and len(lines) > 2

    def test_a_pipe_gets_a_row_a_line_and_all_columns(self) -> None:
        title, head, *rows = bench().lines()
        assert (title, len(rows)) == ("what was measured", 2)
        assert all(row.startswith(PATH) and row.endswith("87%") for row in rows) and head.endswith("of bandwidth")

    @pytest.mark.parametrize("seed", range(40))
    def test_holds_for_any_text(self, seed: int) -> None:
        rng = random.Random(seed)
        signs = "ab-_/=., 好é±\n\t\x1b[0m\ud800"
        table = Table([Column("name", key=seed % 2 == 0, folds=seed % 2 == 1), *numbers({"n": 0}), Column("m", drop=1)])
        counts = [f"{rng.randrange(10**9):,}" for _ in range(4)]
        for count in counts:
            table.add("".join(rng.choices(signs, k=rng.randrange(60))), count, "m" * rng.randrange(9))
        width = rng.randrange(30, 120)
        lines = table.lines(width)
        assert all(cell_len(line) <= width or len(line.split()) == 1 or seed % 2 == 0 for line in lines)
        assert {*counts} <= {*" ".join(lines).split()}
        assert seed % 2 or all(
            row[0].text.split() == [] or _readable(row[0].text, "utf-8") in "\n".join(lines) for row in table.rows
        )


class TestCells:
    def test_styles_are_for_terminals_alone(self) -> None:
        table = Table(["state"])
        table.add(Cell("damaged", "red"))
        assert table.lines(80, styled=True)[1] == "\033[31mdamaged\033[0m"
        assert table.lines()[1] == "damaged"

    def test_a_name_cannot_move_the_cursor_or_end_the_row(self) -> None:
        table = Table(["name"])
        table.add("a\033[2Jb\nc")
        assert table.lines()[1] == r"a\x1b[2Jb c"

    def test_characters_that_the_encoding_lacks_are_replaced_before_they_are_measured(self) -> None:
        table = Table(["score", "next"])
        table.add("0.5 ± 0.1 …", "é")
        assert table.lines(80, encoding="ascii") == ["score           next", r"0.5 +- 0.1 ...  \xe9"]


class TestFold:
    @pytest.mark.parametrize(
        ("text", "width", "lines"),
        [
            ("one two three", 8, ["one two", "three"]),
            ("in runs/pretrain/20261121-060957 it is", 16, ["in", "runs/pretrain/20261121-060957", "it is"]),
            ("abcdefghij", 4, ["abcdefghij"]),
            ("exact_match (strict-match)", 14, ["exact_match", "(strict-match)"]),
        ],
    )
    def test_breaks_at_spaces_alone(self, text: str, width: int, lines: list[str]) -> None:
        assert fold(text, width) == lines
