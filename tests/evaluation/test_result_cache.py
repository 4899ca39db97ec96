"""The cache of results: exact, whole after a kill, shared by processes, and never a traceback."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from plmtune.errors import UserError
from plmtune.evaluation.result_cache import ResultCache, key

VALUES = {key("a", 1): [-0.1 - 1e-17, True], key("b"): ["text\n\u2028é", 3, "stop"], key("c"): 5e-324}

PUTS_FOREVER = """
import sys
from pathlib import Path
from plmtune.evaluation.result_cache import ResultCache, key
cache = ResultCache(Path(sys.argv[1]))
for number in range(10**9):
    cache.put({key(sys.argv[2], number, part): [number, part] for part in range(5)})
    print(number, flush=True)
"""


def database(path: Path, values: int = 500) -> Path:
    with ResultCache(path) as cache:
        cache.put({key(number): [float(number), "x" * 100] for number in range(values)})
    return path


class TestKey:
    def test_the_same_content_gives_the_same_key_in_any_process(self) -> None:
        assert key("kind", [1, 2], {"a": 1, "b": None}) == key("kind", [1, 2], {"b": None, "a": 1})
        assert key("kind", [1, 2]) == xxhash.xxh3_128_digest(b'["kind",[1,2]]')

    def test_parts_are_not_joined(self) -> None:
        assert len({key("ab", "c"), key("a", "bc"), key([1, 2]), key(1, 2), key("1", 2)}) == 5


class TestResultCache:
    def test_what_was_put_comes_back_exactly(self, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "new" / "cache.sqlite") as cache:
            cache.put(VALUES)
        with ResultCache(tmp_path / "new" / "cache.sqlite") as cache:
            assert cache.get([*VALUES, key("unknown")]) == VALUES

    def test_more_keys_than_a_statement_takes_are_found(self, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "cache") as cache:
            cache.put({key(number): number for number in range(2500)})
            found = cache.get([key(number) for number in range(-5, 2505)] * 2)
        assert found == {key(number): number for number in range(2500)}

    def test_a_second_value_takes_the_place_of_the_first(self, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "cache") as cache:
            cache.put({key("a"): 1})
            cache.put({key("a"): 2})
            assert cache.get([key("a")]) == {key("a"): 2}

    def test_of_what_json_cannot_hold_nothing_is_kept(self, tmp_path: Path) -> None:
        with ResultCache(tmp_path / "cache") as cache:
            with pytest.raises(TypeError):
                cache.put({key("a"): 1, key("b"): object()})
            assert cache.get([key("a")]) == {}

    def test_two_killed_processes_leave_all_that_they_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "cache"
        command = [sys.executable, "-c", PUTS_FOREVER, str(path)]
        running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "xy"]
        last = {}
        for process, name in zip(running, "xy", strict=True):
            assert process.stdout is not None
            for line in process.stdout:
                if int(line) >= 20:
                    break
            os.kill(process.pid, signal.SIGKILL)
            last[name] = max([20, *map(int, process.stdout.read().split())])
            process.wait()
        with ResultCache(path) as cache:
            for name, number in last.items():
                keys = [key(name, i, part) for i in range(number + 1) for part in range(5)]
                assert len(cache.get(keys)) == len(keys)
                assert len(cache.get([key(name, number + 1, part) for part in range(5)])) in (0, 5)


class TestDamage:
    @pytest.mark.parametrize("damage", ["not a database", "cut", "page"])
    def test_a_damaged_file_is_moved_aside_in_one_sentence(
        self, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = database(tmp_path / "cache")
        content = bytearray(path.read_bytes())
        if damage == "not a database":
            content[:100] = b"x" * 100
        elif damage == "cut":
            del content[len(content) // 2 :]
        else:
            content[4096:8192] = b"\xff" * 4096
        path.write_bytes(content)
        with ResultCache(path) as cache:
            assert cache.get([key(1)]) == {}
            cache.put({key(1): 2})
            assert cache.get([key(1)]) == {key(1): 2}
        assert capsys.readouterr().err.count("\n") == 1
        assert (tmp_path / "cache.damaged").read_bytes() == content

    def test_damage_met_later_begins_a_new_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = database(tmp_path / "cache", 25_000)  # more pages than a connection keeps in memory
        with ResultCache(path) as cache:
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(b"\xff" * (path.stat().st_size - 4096))
            assert cache.get([key(number) for number in range(1000)]) == {}
            cache.put({key("after"): 1})
            assert cache.get([key("after")]) == {key("after"): 1}
        assert "is damaged" in capsys.readouterr().err

    def test_a_value_with_a_flipped_bit_is_missing(self, tmp_path: Path) -> None:
        path = database(tmp_path / "cache")
        content = path.read_bytes()
        at = content.index(b"[7.0,")
        path.write_bytes(content[: at + 1] + b"6" + content[at + 2 :])
        with ResultCache(path) as cache:
            assert set(cache.get([key(6), key(7), key(8)])) == {key(6), key(8)}

    def test_a_table_of_another_form_is_moved_aside(self, tmp_path: Path) -> None:
        connection = sqlite3.connect(tmp_path / "cache")
        connection.execute("CREATE TABLE results (a)")
        connection.close()
        with ResultCache(tmp_path / "cache") as cache:
            cache.put(VALUES)
        assert (tmp_path / "cache.damaged").exists()


class TestPlaces:
    def test_one_that_cannot_be_made_is_a_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot be made to keep results in"):
            ResultCache(tmp_path / "file" / "cache")

    def test_a_folder_in_its_place_is_a_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot keep results \(unable to open database file\)"):
            ResultCache(tmp_path)

    def test_a_read_only_file_is_a_sentence(self, tmp_path: Path) -> None:
        path = database(tmp_path / "cache")
        path.chmod(0o444)
        tmp_path.chmod(0o555)
        try:
            if os.access(path, os.W_OK):
                pytest.skip("this user may write to anything")
            with pytest.raises(UserError, match="Is its folder writable"):
                ResultCache(path)
        finally:
            tmp_path.chmod(0o755)
