"""Numbers for people: ``5M`` tokens, ``1650B``, ``3.4 GiB``."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: int | str, key: str) -> int:
    """Read a count such as ``5000000``, ``"5M"``, ``"1650B"`` or ``"2.5k tokens"``."""
    match = re.fullmatch(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][0-9]+)?)\s*([KkMmBbTt]?)(?:\s*tokens?)?", str(value).strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{key}: {value!r} is no positive count. Write 5000000, 5M or 1650B.")
    count = float(match[1]) * _SCALE[match[2].upper()]
    if count >= 2**63:
        raise ValueError(f"{key}: {value!r} is more than 64 bits can count.")
    return round(count)


def show_count(value: float) -> str:
    """Write a count with three digits: 1,234 -> 1.23K, 1825458176 -> 1.83B; 1e15 is 1P and 1e18 1E, for FLOPs."""
    value = float(f"{value:.3g}")  # 999,885,952 is 1B
    for letter, scale in {"E": 10**18, "P": 10**15, **dict(reversed(_SCALE.items()))}.items():
        if letter and abs(value) >= scale:
            return f"{show_number(value / scale)}{letter}"
    return show_number(value)


def show_number_of(count: int, what: str) -> str:
    """``1 row``, ``1,024 rows``."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def show_number(value: float, digits: int = 3) -> str:
    """Write a number with three digits and no power of ten: 1954 -> 1,950, 0.03419 -> 0.0342."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded.is_integer() else f"{rounded:g}"


def show_bytes(value: float, unit_of: float | None = None) -> str:
    """Write bytes in powers of 1024: 1.50 GiB; the unit is that of `unit_of` bytes, if given."""
    size, name = byte_unit(value if unit_of is None else unit_of)
    return f"{value / size:,.0f} {name}" if size == 1 else f"{value / size:,.2f} {name}"


def byte_unit(value: float) -> tuple[int, str]:
    """Return the unit in which bytes are written: its size and its name."""
    for exponent, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 2**exponent:
            return 2**exponent, name
    return 1, "B"


def show_duration(seconds: float) -> str:
    """Write seconds as a clock does: 3725 -> 1:02:05, 65 -> 1:05."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}" if minutes >= 60 else f"{minutes}:{left:02}"


def unescape(text: str, name: str) -> str:
    r"""Return the characters that ``\n``, ``\t``, ``\r`` and ``\\`` stand for in an option or a config."""

    def meant(found: re.Match[str]) -> str:
        character = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}.get(found[1])
        if character is None:
            raise ValueError(f"{name} {text!r} holds {found[0]}; \\n, \\t, \\r and \\\\ (a backslash) are known")
        return character

    return re.sub(r"\\(.?)", meant, text)


def with_point(text: str) -> str | None:
    """Return a number with a decimal comma in Python's form, ``0,001`` -> ``0.001``.

    None for other texts, and for several digits before the comma, which may be two numbers.
    """
    found = re.fullmatch(r"\s*([+-]?\d),(\d+(?:[eE][+-]?\d+)?)\s*", text)
    return f"{found[1]}.{found[2]}" if found else None


def runs_of(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of consecutive numbers."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return found
