"""Tables fit a terminal of any width without a cut number; a pipe gets all of them."""

import random
import re

import pytest
from rich.cells import cell_len

from plmtune.tables import Cell, Column, Table, fold, numbers

PATH = "exports/of-some-longer-name/plm_150m-20261121-154047-step-00000635-q4_k_m.gguf"


def bench() -> Table:
    figures = {"context": 0, "first token": 3, "decode/s": 0, "peak memory": 2, "of bandwidth": 1}
    table = Table([Column("target", folds=True), "runtime", *numbers(figures)], title="what was measured")
    for context in ("128", "2,048"):
        table.add(PATH, "llama.cpp", context, "0.123 s", "1,234.5", "123.45 MiB", "87%")
    return table


class TestWidths:
    @pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
    def test_no_line_is_wider_and_no_number_is_broken(self, width: int) -> None:
        lines = bench().lines(width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert text.count("1,234.5") == 2 and "2,048" in text and text.count("llama.cpp") == 2

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_a_path_is_folded_and_not_cut(self, width: int) -> None:
        pieces = [re.split(r"\s{2,}", line)[0] for line in bench().lines(width) if "what was" not in line]
        assert PATH in "".join(pieces).replace(" ", "")

    def test_columns_are_dropped_in_their_order_and_named(self) -> None:
        lines = bench().lines(70)
        assert lines[-2].startswith("Not shown in 70 columns: of bandwidth. A wider terminal")
        assert "decode/s" in lines[1] + lines[2] and "bandwidth" not in "".join(lines[:-2])

    def test_what_cannot_fit_becomes_a_list_of_fields_with_every_column(self) -> None:
        lines = bench().lines(40)
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
        table = Table([Column("name", folds=True), Column("n", right=True), Column("mark", drop=1)])
        counts = [f"{rng.randrange(10**9):,}" for _ in range(4)]
        for count in counts:
            table.add("".join(rng.choices(signs, k=rng.randrange(60))), count, "m" * rng.randrange(9))
        width = rng.randrange(30, 120)
        lines = table.lines(width)
        assert all(cell_len(line) <= width for line in lines)
        assert all(count in "\n".join(lines) for count in counts)


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
            ("runs/pretrain/20261121-060957", 16, ["runs/pretrain/", "20261121-060957"]),
            ("a-name-of-many-signs", 8, ["a-name-", "of-many-", "signs"]),
            ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
            ("exact_match (strict-match)", 14, ["exact_match", "(strict-match)"]),
        ],
    )
    def test_breaks_at_spaces_then_slashes_then_signs(self, text: str, width: int, lines: list[str]) -> None:
        assert fold(text, width) == lines
