"""Rows of files and of the hub, and those that are refused."""

import sys
import types

import pytest

from plmtune.data.row_readers import read_rows
from plmtune.data.rows import Refused, Rows
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
