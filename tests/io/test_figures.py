"""Every figure, of little and of much: ticks can be read, labels lie neither on each other nor on points."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plmtune.devices.equal_shapes import Shape
from plmtune.devices.measure import Measurement
from plmtune.devices.measure_plot import draw as draw_bench
from plmtune.devices.pareto import draw_front, draw_shapes, draw_speeds
from plmtune.devices.predict import Prediction
from plmtune.devices.sweep import Point
from plmtune.evaluation.comparison import compare
from plmtune.evaluation.comparison_plot import draw as draw_comparison
from plmtune.io.figures import annotate, look, new_figure, panels_of, point_boxes, read_ticks, shown_labels, widen
from plmtune.io.metrics import MetricsFile
from plmtune.io.run_comparison import Row, Score
from plmtune.io.run_plot import draw_runs
from plmtune.io.run_summary import Summary
from plmtune.quantization.mixes import propose
from plmtune.quantization.sensitivity import Sensitivities, Sensitivity
from plmtune.quantization.sensitivity_plot import Measured
from plmtune.quantization.sensitivity_plot import draw as draw_sensitivity
from plmtune.registry import component
from plmtune.training.plot import draw_curves


def axes_of(values: list[float], scale: str) -> Any:
    axes = new_figure(6, 4).subplots()
    axes.scatter(values, values)
    axes.set_xscale(scale)
    axes.set_yscale(scale)
    widen(axes)
    axes.figure.draw_without_rendering()
    return axes


def overlapping(artists: list[Any]) -> list[str]:
    boxes = [(artist.get_text(), artist.get_window_extent()) for artist in artists]
    return [f"{a} {b}" for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize(
    "values", [[40.0], [40.0, 40.0], [40.0, 42.0], [1.0, 1e4], [2e-3, 3e-3], [17.0, 23.5, 19.0], [1e5, 3e8]]
)
def test_an_axis_has_two_to_six_labels_that_do_not_overlap(values: list[float], scale: str) -> None:
    axes = axes_of(values, scale)
    read_ticks(axes.xaxis)
    labels = shown_labels(axes.xaxis)
    assert 2 <= len(labels) <= 6, [label.get_text() for label in labels]
    assert len({label.get_text() for label in labels}) == len(labels)
    assert overlapping(labels) == []


@pytest.mark.parametrize("count", [1, 2, 40])
def test_labels_cover_no_label_and_no_point(count: int) -> None:
    values = [1.0 + 0.01 * i for i in range(count)]
    axes = axes_of(values, "linear")
    annotate(axes, [(f"{i}: a name of a point", value, value) for i, value in enumerate(values)])
    assert len(axes.texts) >= min(count, 5)
    assert overlapping(axes.texts) == []
    assert not any(text.get_window_extent().overlaps(box) for text in axes.texts for box in point_boxes(axes))


def test_whole_numbers_and_given_values_are_labelled_where_asked_for() -> None:
    axes = axes_of([1.0, 3.0], "linear")
    read_ticks(axes.xaxis, whole=True)
    assert [label.get_text() for label in shown_labels(axes.xaxis)] == ["1", "2", "3"]
    axes = axes_of([128.0, 2048.0], "log")
    read_ticks(axes.xaxis, at=[128, 2048])
    assert [label.get_text() for label in shown_labels(axes.xaxis)] == ["128", "2,048"]


def test_no_two_of_many_results_look_alike() -> None:
    assert len({tuple(look(number).values()) for number in range(49)}) == 49


Draw = Callable[[Path], None]


def curves(steps: int, *, every: int = 1, layers: int = 0, tokens: int = 0, pairs: bool = False) -> Draw:
    def draw(path: Path) -> None:
        names = ("accuracy", "given_rejected/accuracy", "given_chosen/accuracy")
        with MetricsFile(path.with_name("metrics.jsonl")) as file:
            for step in range(every, steps + 1, every):
                loss = 2.5 + 6 * math.exp(-6 * step / steps) + 0.1 * math.sin(7.7 * step)
                rates = {"lr": 1e-3, "lr/adamw": 2e-3, "lr/head": 3e-3}
                told = {"pairs": 8, **dict.fromkeys(names, 0.6)} if pairs else {}
                file.append(step, {"loss": loss, **rates, **({"tokens": step * tokens} if tokens else {}), **told})
                if step % max(steps // 5 // every * every, every) == 0:
                    zeros = {f"sparsity/{layer}": 0.5 for layer in range(layers)}
                    told = {f"validation/{name}": 0.5 for name in names} if pairs else {}
                    told |= {"direct": 0.3, "refined": 0.4, "eval/gsm8k/exact_match": 0.1} if pairs else {}
                    file.append(step, {"validation_loss": loss, "bits_per_byte": loss / 2, **zeros, **told})
        draw_curves(path.with_name("metrics.jsonl"), path)

    return draw


def comparison(count: int, tasks: int) -> Draw:
    def entry(value: float, stderr: float, metric: str) -> dict[str, Any]:
        score = {metric: {"value": value, "stderr": stderr, "higher_is_better": metric == "acc,none"}}
        return {"num_fewshot": 0, "samples": 100, "metrics": score}

    found = [
        {
            "model": {"name": f"model-{i}", "step": None}, "settings": {}, "status": "complete", "groups": {},
            "failed": {}, "samples": {},
            "tasks": {f"task_{k}": entry(0.3 + 0.02 * i + 0.01 * k, 0.03, "acc,none") for k in range(tasks)}
            | {"wikitext": entry(20.0 + i, 0.2, "word_perplexity,none")}
            | {"lambada": entry(9000.0 + 900 * i, 300.0, "perplexity,none")},
        }
        for i in range(count)
    ]  # fmt: skip
    return lambda path: draw_comparison(compare(found), found, path)


def sensitivity(layers: int, kinds: int, *, mix: bool) -> Draw:
    rng = random.Random(0)
    rows = [
        Sensitivity(
            name, "int4_g32", 20_000, 64_000, 0.0, loss := 10 ** -rng.uniform(1.5, 4), "int8", 34_000, loss / 200
        )
        for name in [f"layers.{i}.ffn.m{k}_proj" for i in range(layers) for k in range(kinds)] + ["tok_embeddings"]
    ]
    found = Sensitivities(rows, loss=3.0, tokens=1022, others=[])
    size, lost = sum(row.bytes for row in rows), sum(row.divergence for row in rows)
    before, after = Measured(sum(row.kept_bytes for row in rows), 3.0), Measured(size + 900, 3.0 + 1.1 * lost)
    rules = propose(found, int(1.2 * size)) if mix else None
    return lambda path: draw_sensitivity(found, path, before, after, tokens=16_352, rules=rules)


def prediction(
    memory: int, decode: float, context: int = 2048, scheme: str = "int4", device: str = "pi5"
) -> Prediction:
    return Prediction(device, "plmtune", scheme, context, 512, 1, memory, 0, 0, 0, 2**33, 0.2, False, 1.0, 1.0, decode)


def front(count: int) -> Draw:
    rng = random.Random(1)
    points = [
        Point({}, 100_000 * (i + 1), 1, prediction(2**28 + i * 2**19 + rng.randrange(2**19), 6000 / (1 + i)))
        for i in range(count)
    ]
    return lambda path: draw_front(points, path, "a sweep")


def shapes(count: int) -> Draw:
    made = [
        Shape({"num_layers": i + 1, "embed_dim": 960 // (i + 1)}, component("model", "plm"), 1, 1) for i in range(count)
    ]
    found = [prediction(2**28, 6000 / (2 + i)) for i in range(count)]
    return lambda path: draw_shapes(made, found, path, "shapes")


def runs(count: int) -> Draw:
    rng = random.Random(2)
    rows = [
        Row(
            Summary(f"runs/{i}", layers=i + 1, width=64 * (1 + i % 7), status="finished"),
            {},
            {"score": 2 + i / count + rng.random() / 5, "speed": 900 / (1 + i) + rng.random()},
        )
        for i in range(count)
    ]
    return lambda path: draw_runs(rows, Score.parse("validation_loss"), path, "a device", bound=True)


def speeds(contexts: tuple[int, ...]) -> Draw:
    found = [
        prediction(2**30, 9 - context / 1000, context, scheme, device)
        for device in ("pi5", "laptop")
        for scheme in ("bf16", "int8", "int4")
        for context in contexts
    ]
    return lambda path: draw_speeds(found, path, "speeds")


def bench(count: int, contexts: tuple[int, ...]) -> Draw:
    found = [
        Measurement(f"a-model-of-a-longer-name-{i}.gguf", "llama.cpp", "Q4_K_M", context, 2, 0.1, 1234.0,
                    900 / (i + 1) - context / 50, 2**27, 2**26, 2**20, 0.8)
        for i in range(count) for context in contexts
    ]  # fmt: skip
    return lambda path: draw_bench(found, path, "a processor, 2 threads")


FIGURES: dict[str, Draw] = {
    "curves of a step": curves(1),
    "curves of 2 steps of pairs": curves(2, pairs=True),
    "curves of 5 steps": curves(5, layers=1),
    "curves of 10,000 steps of pairs": curves(10_000, every=50, pairs=True),
    "curves of 100M tokens": curves(10_000, every=50, layers=22, tokens=10_000),
    "comparison of one": comparison(1, 1),
    "comparison of 2": comparison(2, 1),
    "comparison of 12": comparison(12, 8),
    "sensitivity of one layer": sensitivity(1, 1, mix=False),
    "sensitivity of 32 layers": sensitivity(32, 7, mix=False),
    "sensitivity and a mix": sensitivity(4, 4, mix=True),
    "front of one": front(1),
    "front of 3": front(3),
    "front of 40": front(40),
    "shapes of one": shapes(1),
    "shapes of 12": shapes(12),
    "runs of one": runs(1),
    "runs of 2": runs(2),
    "runs of 30": runs(30),
    "speeds at one context": speeds((128,)),
    "speeds at 3": speeds((128, 2048, 4096)),
    "bench of one": bench(1, (128,)),
    "bench of 12": bench(12, (128, 256, 512, 1024, 2048, 4096)),
}


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: (found.append(self), path.touch()))
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_ticks_and_labels_of_every_figure(name: str, tmp_path: Path, saved: list[Any]) -> None:
    FIGURES[name](tmp_path / "figure.png")
    (figure,) = saved
    for panel in (panel for panel in panels_of(figure) if panel.get_visible()):
        for axis in (panel.xaxis, panel.yaxis):
            labels = shown_labels(axis)
            texts = [label.get_text() for label in labels]
            assert overlapping(labels) == [], texts
            assert len(set(texts)) == len(texts), texts
            numbers = not any(c.isalpha() for text in texts for c in text.replace("M", "").replace("e", ""))
            if texts and numbers and not axis.get_label_text().startswith("layer"):
                assert len(texts) >= 2, (axis.get_label_text(), texts)
            if axis.get_label_text() == "step":
                assert all(text.replace(",", "").isdecimal() for text in texts), texts
        assert overlapping(panel.texts) == []
        covered = [text for text in panel.texts for box in point_boxes(panel) if text.get_window_extent().overlaps(box)]
        assert covered == []


def test_what_was_held_out_is_marked_otherwise_than_what_was_trained_on(tmp_path: Path, saved: list[Any]) -> None:
    curves(2, pairs=True)(tmp_path / "figure.png")
    accuracy = next(panel for panel in saved[0].axes if panel.get_ylabel().startswith("accuracy"))
    faces = {(line.get_label().startswith("_"), line.get_markerfacecolor() == "white") for line in accuracy.lines}
    assert faces == {(False, False), (True, True)}
