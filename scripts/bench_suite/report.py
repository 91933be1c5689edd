"""Turns samples into a table for people and a JSON file for programs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from . import guard
from .plan import PEERS, WORKLOADS
from .rows import Row, rows
from .session import Sheet

COLUMNS = ("workload", "published", "ours", "ratio", "required", "aim")
BESIDE = ("workload", *PEERS, "ours", "ours vs best peer", "aim")
BOUNDS = ("workload", "ours", "bare", "ours vs bare", "in-process", "ours vs in-process", "aim")


def table(sheet: Sheet) -> str:
    """The tables of one DuckDB series: medians, with least and greatest value in brackets."""
    ours = sheet.versions["ours"]
    found = rows(sheet)
    text = [
        f"DuckDB {ours['duckdb']}, pyarrow {ours['pyarrow']}, Python {ours['python']}: "
        f"{', '.join(f'{subject} {version}' for subject, version in versions(sheet).items())}",
        "",
        *_aligned([COLUMNS, *map(_beside_published, found)]),
    ]
    if compared := [_beside_peers(row) for row in found if any(p in row.values for p in PEERS)]:
        text += ["", *_aligned([BESIDE, *compared])]
    if bounded := [_below_bounds(row) for row in found if {"bare", "in-process"} & {*row.values}]:
        text += ["", *_aligned([BOUNDS, *bounded])]
    if sheet.counts:
        text += ["", *guard.lines(sheet.counts, sheet.duckdb)]
    if missed := [line for row in found for line in row.missed()]:
        text += ["", "missed:", *(f"  {line}" for line in missed)]
    text += [f"! {problem}" for problem in [*sheet.failures, *sheet.remarks]]
    return "\n".join(text)


def _beside_published(row: Row) -> list[str]:
    return [
        row.metric.label,
        row.cell("published"),
        row.cell("ours"),
        row.times("published"),
        row.limits("published", "required"),
        row.limits("published", "aim"),
    ]


def _beside_peers(row: Row) -> list[str]:
    best = row.best_peer()
    cells = [row.cell(subject) for subject in (*PEERS, "ours")]
    return [row.metric.label, *cells, f"{row.times(best)} {best or ''}".strip(), row.limits(best)]


def _below_bounds(row: Row) -> list[str]:
    return [
        row.metric.label,
        row.cell("ours"),
        row.cell("bare"),
        row.times("bare"),
        row.cell("in-process"),
        row.times("in-process"),
        row.limits("in-process"),
    ]


def versions(sheet: Sheet) -> dict[str, str]:
    """The version of each server that was measured."""
    named = {"mosaic": "duckdb-server", "quack": "duckdb-extension-quack", "roapi": "roapi"}
    return {
        subject: sheet.versions[subject][named.get(subject, "sqlrooms-server")]
        for subject in ("published", "ours", *PEERS)
        if subject in sheet.versions
    }


def _aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
        if line is lines[0]:
            yield "  ".join("-" * width for width in widths)


def curves(sheet: Sheet) -> list[dict[str, Any]]:
    """How figures grow: for each curve the median of each point, by subject."""
    found = []
    for workload in WORKLOADS:
        for curve in workload.curves:
            points = {
                subject: [
                    [at, median(values)]
                    for at in curve.at
                    if (
                        values := [
                            one[key] for one in samples if (key := f"{curve.key}{at}") in one
                        ]
                    )
                ]
                for subject, samples in sheet.samples.get(workload.name, {}).items()
            }
            if any(points.values()):
                found.append({"workload": workload.name, **asdict(curve), "points": points})
    return found


def document(sheets: Sequence[Sheet], arguments: Sequence[str], began: datetime) -> dict[str, Any]:
    """Everything that was found, as JSON values. Units stand beside the figures."""
    return {
        "began": began.isoformat(timespec="seconds"),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": list(arguments),
        "machine": machine(),
        "tables": [
            {
                "duckdb": sheet.duckdb,
                "versions": sheet.versions,
                "rows": [row.as_json() for row in rows(sheet)],
                "missed": [line for row in rows(sheet) for line in row.missed()],
                "curves": curves(sheet),
                "counts": sheet.counts,
                "counted": list(guard.lines(sheet.counts, sheet.duckdb)) if sheet.counts else [],
                "text": table(sheet),
                "failures": sheet.failures,
                "remarks": sheet.remarks,
            }
            for sheet in sheets
        ],
    }


def machine() -> dict[str, Any]:
    """The machine; memory in bytes, load as the mean number of runnable processes in a minute."""
    return {
        "cpu": _proc_field("cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def _proc_field(file: str, name: str) -> str:
    found = re.search(rf"^{name}\s*:\s*(.*)$", Path("/proc", file).read_text(), re.MULTILINE)
    return found.group(1) if found else ""
