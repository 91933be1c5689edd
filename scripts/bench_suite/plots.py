"""Draws a JSON file's figures as SVG, readable on light and on dark ground. Knows no server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from .figures import short

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 96, 44, 44
_HEIGHT = 360
_BAR, _GAP, _NAMES = 16, 4, 96

# Colours of Okabe and Ito, which those see apart who do not see all colours, as light and as dark
# ground need them. Each subject has its own in every plot.
_COLOURS = {
    "ours": ("#0060a8", "#56b4e9"),
    "published": ("#b35900", "#e69f00"),
    "mosaic": ("#007a56", "#2fc49b"),
    "quack": ("#a3467a", "#e3a0c6"),
    "roapi": ("#8a7a00", "#f0e442"),
    "bare": ("#c1272d", "#ff8a80"),
    "in-process": ("#6a6a6a", "#a8a8a8"),
}

_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:14px;font-weight:600}"
    ".grid{stroke:#8886;stroke-width:1}.line{fill:none;stroke-width:2}.end{text-anchor:end}"
    ".middle{text-anchor:middle}"
)


def _style() -> str:
    def rules(ground: int) -> str:
        return "".join(
            f".line.{name}{{stroke:{colours[ground]}}}.{name}{{fill:{colours[ground]}}}"
            f".line.{name}{{fill:none}}"
            for name, colours in _COLOURS.items()
        )

    dark = f"@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}{rules(1)}}}"
    return f"<style>{_STYLE}{rules(0)}{dark}</style>"


def curve(found: Mapping[str, Any]) -> str:
    """One curve of `report.curves`, both axes logarithmic."""
    points = {name: some for name, some in found["points"].items() if some}
    across = [x for some in points.values() for x, _ in some]
    up = [y for some in points.values() for _, y in some]
    # Whole powers of ten up, so that every plot has lines that can be read off.
    bottom, top = floor(log10(min(up))), max(ceil(log10(max(up))), floor(log10(min(up))) + 1)
    left, right = log10(min(across)), log10(max(across))

    def x(value: float) -> float:
        return _LEFT + (log10(value) - left) / ((right - left) or 1) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return (
            _HEIGHT
            - _BOTTOM
            - (log10(value) - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)
        )

    title = f"{found['title']}: {found['unit']} by {found['across']}"
    parts = [_text(_LEFT, 22, title, "title")]
    for power in range(bottom, top + 1):
        at = y(10.0**power)
        parts.append(_grid(_LEFT, at, WIDTH - _RIGHT, at))
        parts.append(_text(_LEFT - 8, at + 4, short(10.0**power), "end"))
    for value in sorted(set(across)):
        parts.append(_grid(x(value), _TOP, x(value), _HEIGHT - _BOTTOM))
        parts.append(_text(x(value), _HEIGHT - _BOTTOM + 18, short(value), "middle"))
    labels = _apart({name: y(some[-1][1]) for name, some in points.items()}, 14, _HEIGHT - _BOTTOM)
    for name, some in points.items():
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in some)
        parts.append(f'<polyline class="line {name}" points="{path}"/>')
        for at, value in some:
            parts.append(f'<circle class="{name}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3"/>')
        # At the margin even where a curve ends before it; the dot tells which it is.
        margin = WIDTH - _RIGHT + 16
        parts.append(f'<circle class="{name}" cx="{margin}" cy="{labels[name]:.1f}" r="4"/>')
        parts.append(_text(margin + 10, labels[name] + 4, name, ""))
    return _image(_HEIGHT, title, parts)


def bars(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians of several metrics, each scaled by its greatest, with a bar for each subject."""
    parts, at = [_text(8, 22, title, "title")], _TOP
    for row in rows:
        found = {name: value for name, value in row["median"].items() if value is not None}
        most = max(found.values())
        sense = "more" if row["more_is_better"] else "less"
        parts.append(_text(8, at + 12, f"{row['name']}, {row['unit']} ({sense} is better)", ""))
        at += 20
        for name, value in found.items():
            long = max(2.0, value / most * (WIDTH - _NAMES - _RIGHT)) if most else 2.0
            parts.append(_text(_NAMES - 8, at + 12, name, "end"))
            parts.append(
                f'<rect class="{name}" x="{_NAMES}" y="{at}" width="{long:.1f}" height="{_BAR}"/>'
            )
            parts.append(_text(_NAMES + long + 6, at + 12, short(value), ""))
            at += _BAR + _GAP
        at += 12
    return _image(at, title, parts)


def _apart(places: Mapping[str, float], least: float, lowest: float) -> dict[str, float]:
    """The places of labels, moved where they would lie upon each other or below `lowest`."""
    moved: dict[str, float] = {}
    at = float("-inf")
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        moved[name] = at = max(place, at + least)
    at = lowest + least
    for name in reversed(moved):
        moved[name] = at = min(moved[name], at - least)
    return moved


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _grid(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _image(height: float, title: str, parts: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" role="img">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", _style(), *parts, "</svg>", ""])
