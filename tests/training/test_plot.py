"""The picture of a run, and what is drawn in it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from plmtune.errors import UserError
from plmtune.io.metrics import MetricsFile
from plmtune.training.plot import draw_curves, draw_losses, smooth, sparsity_layers


def write_metrics(path, *, num_steps: int = 200, layers: int = 6, every: int = 20) -> None:
    with MetricsFile(path) as file:
        for step in range(1, num_steps + 1):
            loss = 2.5 + 6 * math.exp(-step / 30) + 0.15 * math.sin(step * 7.7)
            rate = 1e-3 * min(step / 20, 1, (num_steps - step) / 60 + 0.1)
            file.append(step, {"loss": loss, "lr": rate, "tokens": step * 16384})
            if step % every == 0:
                sparsity = {f"sparsity/{i}": 0.5 + 0.4 * step / num_steps * i / layers for i in range(layers)}
                value = 2.6 + 6 * math.exp(-step / 30)
                file.append(step, {"validation_loss": value, "bits_per_byte": value / 2.1, **sparsity})


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k)))
    return saved


class TestDrawCurves:
    @pytest.mark.parametrize("layers", [0, 6, 12])
    @pytest.mark.parametrize("num_steps", [1, 5, 200])
    def test_gives_a_png(self, tmp_path, layers, num_steps):
        write_metrics(tmp_path / "metrics.jsonl", layers=layers, num_steps=num_steps, every=max(num_steps // 10, 1))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        data = (tmp_path / "curves.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]

    def test_a_lone_loss_is_enough_and_nan_is_left_out(self, tmp_path):
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            file.append(1, {"loss": 3.0})
            file.append(2, {"loss": float("nan")})
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000

    @pytest.mark.parametrize(("num_steps", "dots"), [(1, 2), (2, 2), (3, 0)])
    def test_few_points_are_drawn_as_dots_and_none_is_cut_at_the_edge(self, tmp_path, figures, num_steps, dots):
        write_metrics(tmp_path / "metrics.jsonl", num_steps=num_steps, every=10)
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        panels = figures[0].axes
        assert sum(line.get_marker() == "o" for panel in panels for line in panel.get_lines()) == dots
        assert all(line.get_xdata()[-1] < panel.get_xlim()[1] for panel in panels for line in panel.get_lines())

    def test_every_groups_rate_is_drawn_and_named(self, tmp_path, figures):
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            for step in range(1, 5):
                file.append(step, {"loss": 3.0, "lr": 0.01, "lr/adamw": 0.02})
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        rates = figures[0].axes[1]
        assert [line.get_label() for line in rates.get_lines()] == ["lr", "lr/adamw"]
        assert [text.get_text() for text in rates.get_legend().get_texts()] == ["lr", "lr/adamw"]

    def test_a_validation_above_the_only_loss_of_a_short_run_is_in_the_picture(self, tmp_path, figures):
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            file.append(6, {"loss": 3.0})
            file.append(6, {"validation_loss": 3.1})
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        assert figures[0].axes[0].get_ylim()[1] > 3.1

    def test_a_teachers_divergence_has_its_own_panel_and_phases_and_averages_are_marked(self, tmp_path, figures):
        with MetricsFile(tmp_path / "metrics.jsonl") as file:
            for step in range(1, 31):
                entry = {"loss": 0.1, "cross_entropy": 3.0, "divergence": 0.05, "tokens": step * 100}
                file.append(step, entry | {"phase": "main" if step <= 20 else "round 2"})
            file.append(30, {"validation_loss": 3.1, "bits_per_byte": 1.5, "ema_validation_loss": 3.05})
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
        losses, *_, divergence = [panel for panel in figures[0].axes if panel.get_legend()]
        assert 3.0 in losses.get_lines()[0].get_ydata() and losses.get_ylim()[1] > 3.1
        assert "averaged weights, at the end 3.050" in losses.get_legend().get_texts()[2].get_text()
        assert [text.get_text() for text in losses.texts] == [" round 2"]
        assert 0.05 in divergence.get_lines()[0].get_ydata()

    def test_a_run_without_a_loss_has_nothing_to_draw(self, tmp_path):
        (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(UserError, match="no training loss"):
            draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
            draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")

    def test_an_unwritable_target_is_named(self, tmp_path):
        write_metrics(tmp_path / "metrics.jsonl", num_steps=2)
        with pytest.raises(UserError, match=r"nowhere/curves\.png cannot be written"):
            draw_curves(tmp_path / "metrics.jsonl", tmp_path / "nowhere" / "curves.png")


def test_losses_of_sequences_are_drawn_with_their_means(tmp_path, figures):
    draw_losses(np.linspace(2, 4, 50), np.array([3.5, 4.0]), tmp_path / "round-2.png", title="round 2")
    (panel,) = figures[0].axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [
        "all: 50, mean 3.000",
        "drawn: 2, mean 3.750",
    ]
    assert (tmp_path / "round-2.png").read_bytes().startswith(b"\x89PNG")


class TestSmooth:
    def test_a_constant_stays_itself(self):
        assert smooth([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])

    def test_a_straight_fall_does_not_lag(self):
        fall = [10.0 - i for i in range(11)]
        assert smooth(fall, 3)[:8] == pytest.approx(fall[:8])

    def test_noise_shrinks(self):
        noisy = [(-1.0) ** i for i in range(41)]
        assert max(abs(v) for v in smooth(noisy, 10)[10:31]) < 0.1


def test_layers_are_in_order_of_number():
    assert sparsity_layers([{f"sparsity/{i}": 0.5 for i in (10, 2, 0)}]) == [
        "sparsity/0",
        "sparsity/2",
        "sparsity/10",
    ]
