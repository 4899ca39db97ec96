"""Mixed formats: the mix of 4 bits, 8 bits and unquantized modules with the least loss within a budget of bytes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from plmtune.quantization.schemes import KEEP
from plmtune.quantization.sensitivity import Sensitivities

# Nats a token that are not worth a byte: a mix that loses no more in all is final, whatever is left of the budget.
NEGLIGIBLE = 1e-4


class Option(NamedTuple):
    """One way to store a module."""

    bytes: int
    divergence: float
    format: str


def propose(found: Sensitivities, budget: int) -> dict[str, str]:
    """Rules for the scheme `mixed` that take at most `budget` bytes, with about the least divergence.

    Each module begins in its smallest format; then bytes are spent where they save most a byte. This is the relaxation
    of the multiple-choice knapsack, which differs from the best mix by less than one module's step. No bytes are spent
    below a loss of `NEGLIGIBLE`.

    Args:
        budget: bytes for the measured modules only.
    """
    for chosen in mixes(options_of(found), budget):
        if sum(option.divergence for option in chosen.values()) < NEGLIGIBLE:
            break
    return _as_rules({name: option.format for name, option in chosen.items()} | dict.fromkeys(found.others, KEEP))


def fit_budget(
    found: Sensitivities, budget: int, *, file_bytes: Callable[[dict[str, str]], int], smallest_file: int
) -> tuple[dict[str, str], int]:
    """The rules that `propose` gives for a budget of a whole file, and the file's size.

    Args:
        budget: bytes of the whole file; ValueError names the size of the smallest mix if that exceeds it.
        file_bytes: size of the file that rules give. Its header depends on the mix, by some bytes.
        smallest_file: size of the file with all modules in their smallest format.
    """
    smallest = sum(row.bytes for row in found)
    left = budget - (smallest_file - smallest)
    while True:
        rules = propose(found, left)
        size = file_bytes(rules)
        if size <= budget:
            return rules, size
        if left == smallest:
            raise ValueError(f"the smallest mix takes {size:,}")
        left = max(left - (size - budget), smallest)


def write_config(path: Path, rules: Mapping[str, str], checkpoint: Path) -> None:
    """Write a mix as an overlay of `plmtune run quantize`."""
    listed = "".join(f"    {json.dumps(pattern)}: {name}\n" for pattern, name in rules.items())
    path.write_text(
        f"# Use: plmtune run quantize {path} checkpoint={checkpoint}\n"
        f"defaults:\n  - override /quantization: mixed\nquantization:\n  rules:\n{listed}",
        encoding="utf-8",
    )


def predict(found: Sensitivities, rules: Mapping[str, str]) -> float:
    """Predict the divergence of a mix in nats a token: the sum of its modules'."""
    return sum(option.divergence for option in choose(options_of(found), rules).values())


def choose(options: Mapping[str, list[Option]], rules: Mapping[str, str]) -> dict[str, Option]:
    """The option of each module that rules select."""
    formats = {name: [f for pattern, f in rules.items() if fnmatchcase(name, pattern)][-1] for name in options}
    return {name: next(o for o in held if o.format == formats[name]) for name, held in options.items()}


def options_of(found: Sensitivities) -> dict[str, list[Option]]:
    """The options of each module, smallest first."""
    return {
        row.module: sorted(
            {
                Option(row.bytes, row.divergence, row.format),
                Option(row.wide_bytes, row.wide_divergence, row.wide_format),
                Option(row.kept_bytes, 0.0, KEEP),
            }
        )
        for row in found
    }


def mixes(options: Mapping[str, list[Option]], budget: float = math.inf) -> Iterator[dict[str, Option]]:
    """Yield mixes from the smallest to the largest within the budget; each differs from the last in one module."""
    chosen = {name: held[0] for name, held in options.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest formats take {budget - left:,} bytes, more than the budget of {budget:,}")
    while True:
        yield dict(chosen)
        steps = [
            ((now.divergence - option.divergence) / (option.bytes - now.bytes), name, option)
            for name, now in chosen.items()
            for option in options[name]
            if 0 < option.bytes - now.bytes <= left and option.divergence < now.divergence
        ]
        if not steps:
            return
        _, name, option = max(steps)
        left -= option.bytes - chosen[name].bytes
        chosen[name] = option


def kind_of(name: str) -> str:
    """A pattern for the same module of every layer: ``layers.3.ffn.up_proj`` -> ``layers.*.ffn.up_proj``."""
    return re.sub(r"^(\w+)\.\d+(?=\.|$)", r"\1.*", name)


def _as_rules(wanted: Mapping[str, str]) -> dict[str, str]:
    """Write the formats of modules as few rules: the most common of all, that of each kind, then single modules."""
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kinds.setdefault(kind_of(name), []).append(name)
    commonest = Counter(wanted.values()).most_common(1)[0][0]
    out = {"*": commonest}
    for kind, members in kinds.items():
        counts = Counter(wanted[name] for name in members)
        usual = max(counts, key=lambda format: (counts[format], format == commonest))
        if usual != commonest:
            out[kind] = usual
        out |= {name: wanted[name] for name in members if wanted[name] != usual}
    return out
