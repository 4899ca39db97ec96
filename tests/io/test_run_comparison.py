"""Runs as rows: filters, order, rank correlations and the Pareto front, from files that runs leave."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from plmtune.config.schema import component_keys
from plmtune.config.signatures import dict_keys
from plmtune.errors import UserError
from plmtune.io.run_comparison import (
    OF_COMPONENTS,
    OF_VALUES,
    Row,
    Score,
    by_chance,
    correlate,
    front,
    groups,
    keep,
    read_rows,
    set_score,
    sort,
    varied,
    write_csv,
)
from plmtune.io.run_directory import RunDirectory
from plmtune.io.run_plot import draw_runs, drawn
from plmtune.registry import describe_components, keys_of

LOSS = Score.parse("validation_loss")


def make(folder: Path, number: int, *, layers: int, loss: float | None, status: str = "finished", **keys: Any) -> Path:
    """A run as pretrain leaves it."""
    model = {"component": "plm", "num_layers": layers, "embed_dim": 256 // layers, "ffn": {"component": "squared_relu"}}
    model["ffn"]["hidden_dim"] = 2 * model["embed_dim"] + 32 * (number % 2)
    config = {"recipe": "pretrain", "seed": 1, "model": model, "ema": False, "data": "stdlib", **keys}
    betas = {0: [0.9, 0.99], 5: [0.9, 0.99], 4: [0.9, 1e-4], 6: 1}.get(number)
    config = {"betas": betas, "init_from": None, "lr": 0.0001} | config
    path = folder / str(number)
    with RunDirectory.create(path, yaml.safe_dump(config), ["plmtune"]) as run:
        run.update(parameters=1000 + number, num_steps=10)
        lines = [{"step": 5, "loss": 3.0, "tokens": 1000 * number, "eval/arc_easy/acc": layers / 10}]
        lines += [{"step": 10, "validation_loss": loss}] if loss is not None else []
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if status != "finished":
        record = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(record | {"status": status}))
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five runs that finished, one that was stopped and one without a validation."""
    tmp_path = tmp_path_factory.mktemp("runs")
    losses = {1: 2.5, 2: 2.4, 4: 2.2, 8: 2.3, 16: 2.1}
    paths = [make(tmp_path, n, layers=layers, loss=loss) for n, (layers, loss) in enumerate(losses.items())]
    paths.append(make(tmp_path, 5, layers=32, loss=9.0, status="stopped"))
    paths.append(make(tmp_path, 6, layers=2, loss=None, data="files"))
    return paths


@pytest.fixture
def rows(paths: list[Path]) -> list[Row]:
    found = read_rows(paths)
    set_score(found, LOSS)
    return found


class TestRows:
    def test_hold_shape_tokens_and_metrics(self, rows: list[Row]) -> None:
        assert rows[2].shape == "4 x 64" and rows[2].summary.tokens == 2000
        assert rows[2].values["ffn_ratio"] == 2 and rows[2].values["eval/arc_easy/acc"] == 0.4
        assert [row.counts for row in rows] == [True] * 5 + [False] * 2

    def test_a_run_that_takes_its_model_from_a_checkpoint_has_the_shape_that_it_saves(self, tmp_path: Path) -> None:
        with RunDirectory.create(tmp_path / "run", "recipe: sft\nmodel: null\n", ["plmtune"]) as run:
            step = run.path / "checkpoints" / "step-00000003"
            step.mkdir(parents=True)
            (step / "config.json").write_text('{"num_hidden_layers": 6, "hidden_size": 48}')
        assert read_rows([tmp_path / "run"])[0].shape == "6 x 48"

    @pytest.mark.parametrize(
        ("text", "numbers"),
        [
            ("model.num_layers>4", "345"),
            ("layers>=4", "2345"),
            ("model.num_layers<2", "0"),
            ("validation_loss<=2.2", "24"),
            ("status=stopped", "5"),
            ("status != finished", "5"),
            ("model.num_layers=2.0", "16"),
            ("ema=false", "0123456"),
            ("data=files", "6"),
            ("ema=False", "0123456"),
            ("betas=[0.9,0.99]", "05"),
            ("betas = [0.9, 0.99]", "05"),
            ("betas=null", "123"),
            ("betas!=[0.9,0.99]", "12346"),
            ("init_from=null", "0123456"),
            ("init_from!=a", "0123456"),
            ("lr=1e-4", "0123456"),
            ("lr=true", ""),
            ("training_loss=3", "0123456"),
        ],
    )
    def test_filters(self, rows: list[Row], text: str, numbers: str) -> None:
        assert "".join(Path(row.summary.path).name for row in keep(rows, text)) == numbers

    def test_order_is_of_numbers_and_runs_without_the_key_are_last(self, rows: list[Row]) -> None:
        def names(text: str) -> str:
            return "".join(Path(row.summary.path).name for row in sort(rows, text))

        assert names("score") == "4231056"
        assert names("score:desc") == "5013246"
        assert names("status")[-1] == "5"

    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda rows: keep(rows, "num_layers=2"), "--filter num_layers: no run has such a key or metric. Did you"),
            (lambda rows: keep(rows, "model.num_layer=2"), r"Did you mean model\.num_layers\?"),
            (lambda rows: keep(rows, "status>finished"), "'finished' is no number, which > needs"),
            (lambda rows: keep(rows, "layers"), "write KEY=VALUE"),
            (lambda rows: sort(rows, "validaton_loss"), r"Did you mean validation_loss\?"),
            (lambda rows: sort(rows, "speed"), "Give --device"),
            (lambda rows: set_score(rows, Score.parse("loss")), "write validation_loss, or training_loss"),
            (lambda rows: set_score(rows, Score.parse("init_from")), "no run has such a key or metric"),
            (lambda rows: set_score(rows, Score.parse("eval/arc_easy/acc_norm")), "Did you mean eval/arc_easy/acc?"),
        ],
    )
    def test_mistakes_are_sentences(self, rows: list[Row], call: Any, says: str) -> None:
        with pytest.raises(UserError, match=says):
            call(rows)

    def test_csv_has_a_line_for_each_and_the_keys_that_differ(self, rows: list[Row], tmp_path: Path) -> None:
        write_csv(rows, tmp_path / "runs.csv", LOSS)
        with (tmp_path / "runs.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        assert len(read) == 7 and read[3]["model.num_layers"] == "8" and read[3]["validation_loss"] == "2.3"
        assert read[5]["status"] == "stopped" and read[6]["validation_loss"] == ""
        assert {"model.embed_dim", "data", "ffn_ratio", "tokens"} <= read[0].keys()
        assert not {"seed", "ema", "recipe.1"} & read[0].keys()


class TestScore:
    @pytest.mark.parametrize(
        ("text", "lower"),
        [
            ("validation_loss", True),
            ("bits_per_byte", True),
            ("eval/wikitext/word_perplexity", True),
            ("eval/arc_easy/acc_norm", False),
            ("eval/x/f1:min", True),
            ("loss:max", False),
            *((key, True) for key in ("divergence", "hidden_difference", "val_ppl", "chosen_nll", "nll", "eval/x/ppl")),
            *((key, False) for key in ("tokens_per_second", "eval/x/applause", "eval/x/bleu", "margin")),
        ],
    )
    def test_says_which_way_is_better(self, text: str, lower: bool) -> None:
        found = Score.parse(text)
        assert found.lower_is_better == lower and found.key == text.removesuffix(":min").removesuffix(":max")


def _rank_correlation(xs: list[float], ys: list[float]) -> float:
    """Spearman's formula for values without ties: 1 - 6 sum d^2 / (n (n^2 - 1))."""
    ranks = [np.argsort(np.argsort(values)) for values in (xs, ys)]
    n = len(xs)
    return float(1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (n * (n * n - 1)))


class TestCorrelations:
    def test_equal_the_formula_and_leave_out_what_is_not_finished(self, rows: list[Row]) -> None:
        found = correlate(rows)
        assert (found.runs, found.unfinished, found.without_score, found.averaged) == (5, 1, 1, 0)
        by_key = {one.key: one for one in found.found}
        wanted = _rank_correlation([1, 2, 4, 8, 16], [2.5, 2.4, 2.2, 2.3, 2.1])
        assert by_key["model.num_layers"].rho == pytest.approx(wanted)
        assert by_key["model.embed_dim"].rho == pytest.approx(-wanted)
        assert {"model.ffn.hidden_dim", "ffn_ratio", "parameters", "tokens"} <= by_key.keys()
        assert all(one.count == 5 for one in found.found) and "seed" not in by_key

    def test_runs_that_differ_in_the_seed_alone_are_one_value(self, tmp_path: Path) -> None:
        paths = []
        for number, layers in enumerate((1, 2, 4, 8)):
            folder = tmp_path / str(number)
            paths += [
                make(folder / f"s{seed}", number, layers=layers, loss=layers + seed, seed=seed) for seed in (1, 2)
            ]
        rows = read_rows(paths)
        set_score(rows, LOSS)
        found = correlate(rows)
        assert (found.runs, found.averaged) == (8, 4)
        assert {one.key: (one.rho, one.count) for one in found.found}["model.num_layers"] == (1.0, 4)
        assert [group.score for group in groups(rows)] == [2.5, 3.5, 5.5, 9.5]
        assert "a_key_of_a_later_version" not in varied(rows)

    def test_runs_on_other_data_are_no_seeds(self, tmp_path: Path) -> None:
        few = {"component": "files", "paths": ["a"]}
        both = {"few": few, "many": few | {"paths": ["b"]}}
        later = {"few": few | {"a_key_of_a_later_version": 1}}
        configs = [{"data": {"component": "mix", "sources": one}} for one in ({"few": few}, both, later)]
        configs.append(configs[0] | {"init_changes": {"ffn": "siaf"}})
        paths = []
        for n, keys in enumerate(configs):
            paths += [make(tmp_path / f"{n}{s}", 1, layers=2, loss=float(n), seed=s, **keys) for s in (1, 2)]
        rows = read_rows(paths)
        set_score(rows, LOSS)
        found = [[int(row.score or 0) for row in group.rows] for group in groups(rows)]
        assert found == [[0, 0, 2, 2], [1, 1], [3, 3]]
        assert {"data.sources.many.paths", "init_changes.ffn"} <= {*varied(rows)}

    def test_dictionaries_whose_names_the_user_chooses_are_those_of_the_configs(self) -> None:
        rules = {
            f"{group}.{key.name}"
            for group in component_keys()
            for name in describe_components().get(group, {})
            for key in keys_of(group, name).values()
            if str(key.type).startswith("dict[")
        }
        assert {*OF_COMPONENTS, *OF_VALUES} == dict_keys() | rules

    def test_keys_that_are_no_numbers_are_named(self, tmp_path: Path) -> None:
        kinds = ["files", "stdlib", "files", "stdlib"]
        rows = read_rows([make(tmp_path, n, layers=n + 1, loss=2.0 + n, data=kind) for n, kind in enumerate(kinds)])
        set_score(rows, LOSS)
        assert correlate(rows).no_numbers == ["betas", "data"] and "data" in varied(rows)

    def test_what_chance_gives_is_the_quantile_of_permutations(self) -> None:
        found = by_chance(9)
        assert found is not None and abs(found - 0.683) < 0.03  # 0.683 to 0.700 in tables of the exact distribution
        assert by_chance(4) is None


class TestFront:
    def test_equals_its_definition(self, rows: list[Row]) -> None:
        for row, speed in zip(rows, (90.0, 80.0, 85.0, 70.0, 60.0, 99.0, 99.0), strict=True):
            row.values["speed"] = speed
        assert [Path(group.rows[0].summary.path).name for group in front(groups(rows), LOSS)] == ["0", "2", "4"]
        accuracy = Score.parse("eval/arc_easy/acc")
        set_score(rows, accuracy)
        best = front(groups(rows), accuracy)
        assert [Path(group.rows[0].summary.path).name for group in best] == ["6", "2", "3", "4"]

    def test_ties_are_all_there(self, rows: list[Row]) -> None:
        for row, (speed, score) in zip(rows[:4], [(9.0, 2.0), (9.0, 2.0), (9.0, 3.0), (8.0, 2.0)], strict=True):
            row.values |= {"speed": speed, "score": score}
        assert [group.rows[0] for group in front(groups(rows[:4]), LOSS)] == rows[:2]

    def test_the_plot_has_the_runs_that_count(self, rows: list[Row], tmp_path: Path) -> None:
        for row in rows:
            row.values["speed"] = 100.0 / row.values["layers"]
        draw_runs(rows, LOSS, tmp_path / "runs.png", "runs", bound=False)
        assert [group.name for group in drawn(rows)] == ["1 x 256", "2 x 128", "4 x 64", "8 x 32", "16 x 16"]
        assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
