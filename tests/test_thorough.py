"""The list of thorough tests names tests that exist."""

from pathlib import Path


def test_every_listed_test_exists() -> None:
    root = Path(__file__).parent
    lines = root.joinpath("thorough.txt").read_text(encoding="utf-8").splitlines()
    gone = []
    for line in lines:
        file, *_, name = line.partition("[")[0].split("::")
        path = root.parent / file
        if not path.is_file() or f"def {name}(" not in path.read_text(encoding="utf-8"):
            gone.append(line)
    assert gone == []
    assert lines == sorted(set(lines))
