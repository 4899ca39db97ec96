"""What a pruning keeps of its measurements."""

from pathlib import Path

import pytest
import torch

from plmtune.pruning import kept
from plmtune.pruning.kept import Kept, key_of, rises_of, tensors_of


def test_what_is_damaged_or_of_another_key_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = Kept(tmp_path, "key")
    files.save("units", {"channels": torch.ones(3)})
    assert files.read("units")["channels"].tolist() == [1, 1, 1] and files.read("rises") == {}
    assert Kept(tmp_path, "other").read("units") == {}
    assert "it is of another model or text); it is measured again" in capsys.readouterr().out
    path = tmp_path / "measured/units.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert files.read("units") == {}
    assert "the numbers do not match their checksum" in capsys.readouterr().out
    files.remove()
    assert not [*tmp_path.iterdir()]


def test_a_state_is_saved_from_time_to_time_and_where_a_signal_stops_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(kept.time, "monotonic", lambda: now)
    files, saved = Kept(tmp_path, "key"), []
    monkeypatch.setattr(files, "save", lambda name, tensors: saved.append((name, tensors)))

    def work(error: BaseException | None) -> None:
        nonlocal now
        with files.saving("mask", lambda: {"step": torch.tensor(now)}) as due:
            for second in (10.0, 59.0, 61.0):
                now = second
                due()
            if error:
                raise error

    with pytest.raises(SystemExit):
        work(SystemExit(75))
    assert [float(tensors["step"]) for _, tensors in saved] == [61, 61]  # after a minute, and at the end
    saved.clear()
    with pytest.raises(RuntimeError):
        work(RuntimeError())
    assert len(saved) == 1  # what an error leaves is not kept
    saved.clear()
    work(None)
    assert len(saved) == 2


def test_rises_and_keys() -> None:
    rises = {(0, 1): 0.25, (3, 2): -1 / 3}
    assert rises_of(tensors_of(rises)) == rises and rises_of({}) == {} == rises_of(tensors_of({}))
    one, two = torch.tensor([1, 2]), torch.tensor([0.5], dtype=torch.bfloat16)
    assert key_of([one, two]) == key_of([one.clone(), two]) != key_of([two, one])
