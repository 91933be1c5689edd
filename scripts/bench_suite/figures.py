"""How figures, ratios and limits are written."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def figure(value: float) -> str:
    """A number with three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def short(value: float) -> str:
    """A number in few characters: 512, 10 k, 60 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == ' k' else size):.3g}{letter}"
    return figure(value)


def ranged(values: Sequence[float], unit: str) -> str:
    """The median, with the least and the greatest in brackets where there are several."""
    middle = f"{figure(median(values))} {unit}"
    if len(values) == 1:
        return middle
    return f"{middle} ({figure(min(values))}-{figure(max(values))})"


def spread(values: Sequence[float], unit: str) -> str:
    """The median, and how far it is at most from a value, in percent."""
    middle = median(values)
    if len(values) == 1 or not middle:
        return f"{figure(middle)} {unit}"
    far = max(max(values) - middle, middle - min(values)) / abs(middle)
    return f"{figure(middle)} {unit} ±{figure(far * 100)} %"


def times(ratio: float, more_is_better: bool) -> str:
    """A ratio; one of what should be little as a fraction, if it is."""
    if ratio < 0.5 and not more_is_better:
        return f"1/{figure(1 / ratio)}"
    return f"{figure(ratio)}x"
