"""Puts the figures of a JSON file into a page, and its plots beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import plots

BEGIN, END = "<!-- figures: scripts/bench --page -->", "<!-- end of figures -->"

BARS = {
    "small": ("select 1", ("one/qps", "many/qps", "clients/q64", "clients/q512")),
    "results": ("large results", ("mixed/mbps", "large/mbps", "rows/r60000000", "large/growth")),
    "tpch": ("TPC-H, 16 clients", ("tpch/q1", "tpch/q6", "tpch/q3")),
    "start": (
        "start and memory",
        ("start/first", "start/memory", "memory/connection", "memory/stream"),
    ),
}


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
        lines.append(f"```\n{table['text']}\n```")
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
    rows = {f"{row['workload']}/{row['metric']}": row for row in table["rows"]}
    for name, (title, wanted) in BARS.items():
        found = [
            {**rows[key], "name": _name(rows, key)}
            for key in wanted
            if key in rows and rows[key]["best_peer"]
        ]
        if found:
            yield name, plots.bars(title, found)
    for curve in table["curves"]:
        yield f"{curve['workload']}-{curve['key']}", plots.curve(curve)


def _name(rows: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """The label of a metric, after that of the first of its workload."""
    workload = key.partition("/")[0]
    first = next(row["label"] for name, row in rows.items() if name.startswith(f"{workload}/"))
    label = str(rows[key]["label"])
    return label if label == first else f"{first}: {label}"
