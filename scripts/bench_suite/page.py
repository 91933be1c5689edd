"""Puts the figures of a JSON file into a page, and its plots beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .figures import spread, times
from .plan import PEERS

BEGIN, END = "<!-- figures: scripts/bench --page -->", "<!-- end of figures -->"

BARS = ("one/qps", "many/qps", "clients/q64", "clients/q512")
LONGEST = 300
_MARKS = {True: " ✓", False: " ✗", None: ""}


class NoPlace(Exception):
    """The page does not say where the figures go."""


def write(document: Mapping[str, Any], page: Path) -> None:
    """Renew what stands between the marks of `page`, and the plots in a folder of its name.

    A page that is not there is made, with nothing but the figures.
    """
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NoPlace(f"{page} needs the lines {BEGIN!r} and {END!r} around its figures")
    folder = page.with_suffix("")
    lines = [_run(document)]
    for table in document["tables"]:
        lines.append(f"### DuckDB {table['versions']['ours']['duckdb']}")
        images = dict(_images(table))
        for name, image in images.items():
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{name}-{table['duckdb']}.svg"
            file.write_text(image, encoding="utf-8")
            title = image.partition("<title>")[2].partition("</title>")[0]
            lines.append(f"![{title}]({folder.name}/{file.name})")
        lines += [part for part in _parts(table) if part]
    body = "\n\n".join(lines)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")


def _run(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    command = " ".join(["scripts/bench", *_without_files(document["arguments"])])
    return (
        f"`{command}` on {document['began'][:10]}, on {machine['cores']} cores of "
        f"{machine['cpu'] or 'an unnamed processor'} with {machine['memory'] / 1e9:.0f} GB, "
        f"{machine['kernel']}, load {machine['load']:.1f} at its end."
    )


def _without_files(arguments: list[str]) -> Iterator[str]:
    """Of a command line what says what was measured."""
    named = iter(arguments)
    for argument in named:
        if argument in ("--environments", "--json", "--page", "--from"):
            next(named, None)
        elif not argument.startswith(("--environments=", "--json=", "--page=", "--from=")):
            yield argument


def _images(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = [
        row
        for row in table["rows"]
        if f"{row['workload']}/{row['metric']}" in BARS and any(row["samples"].values())
    ]
    if found:
        yield "small", plots.bars("small queries", found)
    for curve in table["curves"]:
        yield f"{curve['workload']}-{curve['key']}", plots.curve(curve)


def _parts(table: Mapping[str, Any]) -> Iterator[str]:
    """The tables and lists of one DuckDB series, as Markdown."""
    found = table["rows"]
    yield _table(
        ("", "ours", "published", "best peer", "bare", "in-process"),
        (
            (
                _label(row),
                _joined(_values(row, "ours"), *_limits(row, "")),
                _beside(row, "published"),
                _joined(row["best_peer"] or "", _beside(row, row["best_peer"])),
                _beside(row, "bare"),
                _beside(row, "in-process"),
            )
            for row in found
        ),
    )
    beside = [row for row in found if any(peer in row["samples"] for peer in PEERS)]
    columns = ("ours", *PEERS)
    if beside:
        yield "Every peer:"
        yield _table(
            ("", *columns),
            ((_label(row), *(_values(row, name) for name in columns)) for row in beside),
        )
    yield _list("Limits that are not kept:", table["missed"])
    yield _list("Counts:", table["counted"])
    yield _list("What went wrong, or is missing:", [*table["failures"], *table["remarks"]])


def _label(row: Mapping[str, Any]) -> str:
    """The first metric of a workload is named in full, and the others are below it."""
    return str(row["label"]) if row["label"] == row["name"] else f"&nbsp; {row['label']}"


def _beside(row: Mapping[str, Any], subject: str | None) -> str:
    """The figure of another, ours / it, and the limits of that."""
    if subject is None:
        return ""
    ratio = row["ratios"].get(subject)
    ratio = "" if ratio is None else f"**{times(ratio, row['more_is_better'])}**"
    return _joined(_values(row, subject), ratio, *_limits(row, subject))


def _values(row: Mapping[str, Any], subject: str) -> str:
    values = row["samples"].get(subject)
    return spread(values, row["unit"]) if values else row["missing"].get(subject, "")


def _limits(row: Mapping[str, Any], against: str) -> Iterator[str]:
    for demand in row["demands"]:
        if demand["against"] == against and demand["met"] is not None:
            aim = "aim " if demand["kind"] == "aim" else ""
            yield f"{aim}{demand['text']}{_MARKS[demand['met']]}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(title: str, items: Sequence[str]) -> str:
    # A server's log may come with what went wrong.
    lines = [f"- {' '.join(item.split())[:LONGEST]}" for item in items]
    return "\n".join([title, "", *lines]) if lines else ""
