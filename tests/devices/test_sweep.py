"""Sweeps over architectures, and the front of those that nothing beats."""

from pathlib import Path

import pytest

from plmtune.devices.device import load_device
from plmtune.devices.pareto import draw_front, draw_speeds, front
from plmtune.devices.sweep import Sweep, sweep
from plmtune.errors import UserError

BASE = ["model=plm_tiny", "model.max_seq_len=4096"]


@pytest.fixture(scope="module")
def found() -> Sweep:
    keys = ["model.embed_dim=64,128,256", "model.num_layers=range(2,9,2)", "model.num_heads=4,0"]
    return sweep("pretrain", (), [*BASE, *keys], load_device("pi5"))


class TestSweep:
    def test_every_combination_is_there_or_named_impossible(self, found: Sweep) -> None:
        assert len(found.points) == 12
        assert {len(settings) for settings in found.impossible.values()} == {12}
        assert "num_heads (0) must be at least 1" in next(iter(found.impossible))

    def test_a_point_is_what_the_config_alone_gives(self, found: Sweep) -> None:
        alone = sweep(
            "pretrain",
            (),
            [*BASE, "model.num_layers=4", "model.num_heads=4", "model.embed_dim=128,64"],
            load_device("pi5"),
        )
        wanted = {"model.embed_dim": "128", "model.num_layers": "4", "model.num_heads": "4"}
        same = next(point for point in found.points if point.settings == wanted)
        assert same.prediction == alone.points[0].prediction
        assert same.parameters == alone.points[0].parameters

    def test_choices_of_components_can_be_swept(self) -> None:
        made = sweep("pretrain", (), [*BASE, "model/ffn=swiglu,squared_relu"], load_device("pi5"))
        assert [point.settings for point in made.points] == [{"model/ffn": "swiglu"}, {"model/ffn": "squared_relu"}]
        assert made.points[0].parameters != made.points[1].parameters

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["model.embed_dim=64"], "no key has several values"),
            (["seq_len=64,128"], "seq_len is no key of the model"),
            (["model.embed_dim=range(1,100000)"], "99,999 combinations are more than"),
            (["model.embed_dim=interval(1,2)"], "names no single values"),
        ],
    )
    def test_mistakes_are_sentences(self, overrides: list[str], says: str) -> None:
        with pytest.raises(UserError, match=says):
            sweep("pretrain", (), [*BASE, *overrides], load_device("pi5"))


class TestFront:
    def test_equals_its_definition(self, found: Sweep) -> None:
        def merits(point: object) -> tuple[float, ...]:
            return point.prediction.decode, -point.prediction.memory, point.parameters  # type: ignore[attr-defined]

        def beaten(point: object) -> bool:
            mine = merits(point)
            others = [merits(other) for other in found.points]
            return any(all(a >= b for a, b in zip(o, mine, strict=True)) and o != mine for o in others)

        best = front(found.points)
        assert {id(point) for point in best} == {id(point) for point in found.points if not beaten(point)}
        speeds = [point.prediction.decode for point in best]
        assert speeds == sorted(speeds, key=lambda speed: -(speed or 0))

    def test_pictures_are_drawn(self, found: Sweep, tmp_path: Path) -> None:
        draw_front(found.points, tmp_path / "front.png", "a sweep")
        draw_speeds([point.prediction for point in found.points], tmp_path / "speeds.png", "speeds")
        for path in tmp_path.iterdir():
            assert path.read_bytes().startswith(b"\x89PNG")
        assert len(list(tmp_path.iterdir())) == 2
