"""Runs as rows of values, to filter, sort and correlate them. No torch."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from plmtune.errors import UserError, did_you_mean
from plmtune.io.atomic import write_atomically
from plmtune.io.run_summary import Summary, config_of, newest_metrics, summarize
from plmtune.io.untrusted import load_yaml

SCORE, SPEED = "score", "speed"
LAYERS, WIDTH, FFN = "model.num_layers", "model.embed_dim", "model.ffn.hidden_dim"
FEWEST = 4  # runs of a correlation
# Keys that say where a run is or how it began, not what it trains.
_OWN = ("run_dir", "resume", "name", "recipe", "force", "allow_data_change")
_LOWER_IS_BETTER = re.compile(
    r"loss|bits_per_byte|perplexity|entropy|divergence|difference|brier|error|seconds|"
    r"(?<![a-z])(?:ppl|kl|nll|nats|wer|cer|ter)(?![a-z])"
)
# Dictionaries of a config whose names the user chooses: of components, and of other values.
OF_COMPONENTS = ("data.sources", "logger.loggers")
OF_VALUES = ("init_changes", "quantization.rules")
_FILTER = re.compile(r"\s*([^=<>!]+?)\s*(>=|<=|!=|=|>|<)\s*(.*?)\s*", re.DOTALL)
_DRAWS = 20_000


@dataclass
class Row:
    """One run.

    Attributes:
        config: its keys and values, in one level.
        values: all that can be named: its summary, config and newest metrics, and what follows from them.
    """

    summary: Summary
    config: dict[str, Any]
    values: dict[str, Any]

    @property
    def score(self) -> float | None:
        """A finite number, or None."""
        return number(self.values.get(SCORE))

    @property
    def counts(self) -> bool:
        """Whether it is part of correlations and plots: it is finished and has a score."""
        return self.summary.status == "finished" and self.score is not None

    @property
    def shape(self) -> str:
        return self.summary.shape


@dataclass(frozen=True)
class Score:
    """What runs are compared by."""

    key: str
    lower_is_better: bool

    @classmethod
    def parse(cls, text: str) -> Score:
        """``KEY``, ``KEY:min`` or ``KEY:max``; a loss, bits a byte or a perplexity is better where it is lower."""
        key, _, way = text.rpartition(":")
        if way in ("min", "max"):
            return cls(key, way == "min")
        return cls(text, bool(_LOWER_IS_BETTER.search(text)))

    @property
    def shown(self) -> str:
        return f"{self.key} ({'lower' if self.lower_is_better else 'higher'} is better)"


def number(value: Any) -> float | None:
    """A value as a finite number; None for others, also for true and false."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """What the files of each run say; later sources win where names meet."""
    rows = []
    for path in paths:
        summary, config = summarize(path), config_of(path)
        logged = newest_metrics(path / "metrics.jsonl")
        values = {**logged, **asdict(summary), "run": summary.path, "training_loss": logged.get("loss")}
        hidden, width = number(config.get(FFN)), number(summary.width)
        values["ffn_ratio"] = hidden / width if hidden and width else None
        known = {key: value for key, value in values.items() if value is not None}
        rows.append(Row(summary, config, config | known))
    return rows


def set_score(rows: Sequence[Row], score: Score) -> None:
    """Give each row its score, and refuse a key that no run has."""
    check_key(rows, score.key, "--score")
    if score.key == "loss" and any("training_loss" in row.values for row in rows):
        # In the table it is what a run has of the two, which are not to be compared with each other.
        raise UserError("--score loss: write validation_loss, or training_loss for the newest that a run logged.")
    for row in rows:
        found = number(row.values.get(score.key))
        if found is not None:
            row.values[SCORE] = found


def check_key(rows: Sequence[Row], key: str, flag: str) -> None:
    nulls = flag == "--filter"
    known = {name for row in rows for name, value in row.values.items() if nulls or value is not None}
    if key not in known:
        if key in (SPEED, SCORE):
            raise UserError(f"{flag} {key}: no run has one here. Give --{'device' if key == SPEED else 'score'}.")
        leaves = [name for name in sorted(known) if name.rpartition(".")[2] == key]
        hint = f" Did you mean {leaves[0]}?" if leaves else did_you_mean(key, known)
        if len(hint) > 400:
            hint = " Keys are those of a config, such as model.num_layers, and those of metrics.jsonl."
        raise UserError(f"{flag} {key}: no run has such a key or metric.{hint}")


def keep(rows: Sequence[Row], text: str) -> list[Row]:
    """The rows that a filter such as ``model.num_layers>=4`` or ``status=finished`` holds for."""
    found = _FILTER.fullmatch(text)
    if not found:
        raise UserError(f"--filter {text!r:.200}: write KEY=VALUE, KEY!=VALUE, KEY>VALUE, KEY>=VALUE and so on.")
    key, sign, wanted = found.groups()
    check_key(rows, key, "--filter")
    compared = _as_number(wanted)
    if sign[0] in "<>" and compared is None:
        raise UserError(f"--filter {text!r:.200}: {wanted!r:.80} is no number, which {sign} needs.")
    same = _read(wanted)
    return [row for row in rows if key in row.values and _holds(row.values[key], sign, wanted, same, compared)]


def _read(text: str) -> Any:
    """A value as a config has it: a number, true, null or a list; what is no YAML is a text."""
    try:
        return load_yaml(text) if text else text
    except yaml.YAMLError:
        return text


def _holds(value: Any, sign: str, wanted: str, same: Any, compared: float | None) -> bool:
    own = number(value)
    if sign in ("=", "!="):
        return (_equal(value, same) or _text(value) == wanted) == (sign == "=")
    if own is None or compared is None:
        return False
    above, equal = own > compared, own == compared
    return (above if sign[0] == ">" else not (above or equal)) or (equal and sign.endswith("="))


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(value, list) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_equal, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        return value.keys() == wanted.keys() and all(_equal(value[key], wanted[key]) for key in value)
    if (own := number(value)) is not None:  # 1e-4 is a text in YAML
        return own == (_as_number(wanted) if isinstance(wanted, str) else number(wanted))
    return type(value) is type(wanted) and bool(value == wanted)


def _as_number(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def sort(rows: Sequence[Row], text: str) -> list[Row]:
    """Rows by a key, ``KEY`` or ``KEY:desc``: numbers, then texts, and last those without it."""
    key, _, way = text.rpartition(":")
    if way not in ("asc", "desc"):
        key, way = text, "asc"
    check_key(rows, key, "--sort")

    def kind(row: Row) -> int:
        return 2 if row.values.get(key) is None else 0 if number(row.values[key]) is not None else 1

    def place(row: Row) -> tuple[float, str]:
        value = row.values.get(key)
        return (number(value) or 0.0, "" if number(value) is not None else _text(value))

    return sorted(sorted(rows, key=place, reverse=way == "desc"), key=kind)


def varied(rows: Sequence[Row]) -> list[str]:
    """Keys of configs with several values.

    A run that has no such key, as one of an earlier version, does not count, unless it is in a dictionary whose names
    the user chooses, such as ``data.sources``: there absence is a value.
    """
    values: dict[str, set[str]] = {key: set() for row in rows for key in row.config}
    for row in rows:
        names = {name for key in row.config if (name := _chosen_name(key)) is not None}
        for key, found in values.items():
            if key in row.config:
                found.add(repr(row.config[key]))
            elif (name := _chosen_name(key)) is not None and name not in names:
                found.add("absent")
    return [key for key, found in values.items() if len(found) > 1 and key not in _OWN]


def _chosen_name(key: str) -> str | None:
    """The part of a key up to the name that the user chose; None if it has no such name."""
    if any(key.startswith(f"{place}.") for place in OF_VALUES):
        return key
    place = next((place for place in OF_COMPONENTS if key.startswith(f"{place}.")), None)
    return None if place is None else f"{place}.{key.removeprefix(f'{place}.').partition('.')[0]}"


@dataclass
class Group:
    """Finished runs with a score that differ in the seed alone, one value of a comparison."""

    rows: list[Row]

    @property
    def scores(self) -> list[float]:
        return [row.score for row in self.rows if row.score is not None]

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def speed(self) -> float | None:
        return number(self.rows[0].values.get(SPEED))

    @property
    def name(self) -> str:
        return self.rows[0].shape or Path(self.rows[0].summary.path).name


def groups(rows: Sequence[Row]) -> list[Group]:
    """The runs that count, those together that differ in the seed alone."""
    counted = [row for row in rows if row.counts]
    keys = [key for key in varied(counted) if key != "seed"]
    found: dict[str, Group] = {}
    for row in counted:
        found.setdefault(repr([row.config.get(key) for key in keys]), Group([])).rows.append(row)
    return [*found.values()]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of a key with the score, over `count` runs."""

    key: str
    rho: float
    count: int


@dataclass
class Correlations:
    """Correlations of the runs that count.

    Attributes:
        runs: that count.
        averaged: groups of runs that differ in the seed alone, whose mean score is one value; 0: each run is one.
        unfinished, without_score: runs that are left out.
        no_numbers: keys that differ and are no numbers.
    """

    found: list[Correlation] = field(default_factory=list)
    runs: int = 0
    averaged: int = 0
    unfinished: int = 0
    without_score: int = 0
    no_numbers: list[str] = field(default_factory=list)


def correlate(rows: Sequence[Row], extra: Sequence[str] = ()) -> Correlations:
    """Correlate each key that differs with the score, and what follows from the keys: parameters, ratio of the FFN.

    Args:
        extra: further keys of values, such as the predicted speed.
    """
    from scipy.stats import spearmanr  # its import takes a second

    done = Correlations()
    counted = [row for row in rows if row.counts]
    done.unfinished = sum(row.summary.status != "finished" for row in rows)
    done.without_score = len(rows) - len(counted) - done.unfinished
    done.runs = len(counted)
    if not counted:
        return done
    keys = [key for key in varied(counted) if key != "seed"]
    grouped = groups(rows)
    done.averaged = len(grouped) if len(grouped) < len(counted) else 0
    derived = [
        *([] if LAYERS in keys else ["layers"]),
        *([] if WIDTH in keys else ["width"]),
        *("ffn_ratio", "parameters", "tokens"),
        *extra,
    ]
    for key in [*keys, *derived]:
        pairs = [(number(group.rows[0].values.get(key)), group.score) for group in grouped]
        numbers = [(value, score) for value, score in pairs if value is not None]
        if key in keys and not numbers:
            done.no_numbers.append(key)
        elif len(numbers) >= FEWEST and len({value for value, _ in numbers}) > 1:
            rho = float(spearmanr(*zip(*numbers, strict=True)).statistic)
            if math.isfinite(rho):  # of equal scores there is none
                done.found.append(Correlation(key, rho, len(numbers)))
    done.found.sort(key=lambda one: -abs(one.rho))
    return done


def by_chance(count: int) -> float | None:
    """The absolute rank correlation that one key without effect exceeds in 5% of cases, by permutations."""
    import numpy as np

    if count < 5:  # of four orders are so few that even the best comes more often
        return None
    draws = np.random.default_rng(0).permuted(np.tile(np.arange(count, dtype=float), (_DRAWS, 1)), axis=1)
    centred = np.arange(count) - (count - 1) / 2
    rho = (draws - (count - 1) / 2) @ centred / (centred @ centred)
    return float(np.quantile(np.abs(rho), 0.95))


def front(found: Sequence[Group], score: Score) -> list[Group]:
    """The groups of which no other is as fast and as good and better in one; the fastest first. Ties are all there."""
    sign = 1 if score.lower_is_better else -1
    best: list[Group] = []
    for group in sorted(found, key=lambda one: (-(one.speed or 0.0), sign * one.score)):
        if group.speed is None:
            continue
        tie = best and (group.speed, group.score) == (best[-1].speed, best[-1].score)
        if not best or tie or sign * group.score < sign * best[-1].score:
            best.append(group)
    return best


def write_csv(rows: Sequence[Row], path: Path, score: Score) -> None:
    """Write a line for each run: what its files say, its score and predicted speed, and the keys that differ."""
    keys = [key for key in varied(rows) if key not in Summary.__dataclass_fields__]
    columns = [*Summary.__dataclass_fields__, "ffn_ratio", SCORE, SPEED, *keys]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([score.key if key == SCORE and score.key not in columns else key for key in columns])
    for row in rows:
        writer.writerow(["" if row.values.get(key) is None else row.values[key] for key in columns])
    write_atomically(path, text.getvalue(), user_error=True)
