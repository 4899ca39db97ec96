"""A lock that is removed when it is let go keeps out whoever waited for it, too."""

import threading
import time
from pathlib import Path

import pytest

from plmtune.io.lock import exclusive


class TestExclusive:
    def test_one_holds_it_at_a_time_and_nothing_is_left(self, tmp_path: Path) -> None:
        inside, most = 0, 0

        def work() -> None:
            nonlocal inside, most
            for _ in range(10):
                with exclusive(tmp_path / ".lock", "tests"):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0005)
                    inside -= 1

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1
        assert not [*tmp_path.iterdir()]

    def test_an_error_removes_it(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), exclusive(tmp_path / ".lock", "tests"):
            raise RuntimeError
        assert not [*tmp_path.iterdir()]
