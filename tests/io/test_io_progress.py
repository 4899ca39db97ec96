import time

import pytest

from plmtune.io.progress import ticking


class TestTicking:
    @pytest.mark.parametrize(("every", "said"), [(2.0, ["2 rows", "4 rows", "5 rows"]), (5.0, ["5 rows"]), (9.0, [])])
    def test_says_how_many_have_passed_and_at_last_all_of_them(self, every, said, monkeypatch, capsys):
        seconds = iter(range(9))
        monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
        assert list(ticking("abcde", "rows", shown=True, every=every)) == list("abcde")
        assert capsys.readouterr().err.splitlines() == said
