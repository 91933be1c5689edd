"""Turns samples into a table for people and a JSON file for programs."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from . import guard
from .plan import PEERS, SUBJECTS, WORKLOADS, Metric
from .session import Sheet

COLUMNS = (
    "workload",
    "published",
    "ours",
    "ratio",
    "required",
    "aim",
    "in-process",
    "ours vs in-process",
)


BESIDE = (
    "workload",
    "published",
    *PEERS,
    "ours",
    "to the best peer",
    "aim",
    "in-process",
)


@dataclass(frozen=True)
class Row:
    """One metric of one workload, with its values by subject."""

    workload: str
    metric: Metric
    values: dict[str, list[float]]

    def median(self, subject: str) -> float | None:
        values = self.values.get(subject)
        return median(values) if values else None

    def ratio(self, base: str) -> float | None:
        """Ours / base, of the medians. Less than nothing counts as next to nothing."""
        ours, other = self.median("ours"), self.median(base)
        if ours is None or other is None:
            return None
        return max(ours, 1e-3) / max(other, 1e-3)

    def met(self, limit: float | None, *, against: str = "published") -> bool | None:
        """Whether a limit of the metric is kept; None where there is nothing to compare."""
        ours = self.median("ours") if self.metric.absolute else self.ratio(against)
        if limit is None or ours is None:
            return None
        return ours >= limit if self.metric.more_is_better else ours <= limit

    def best_peer(self) -> str | None:
        """The peer with the best median."""
        found = {peer: middle for peer in PEERS if (middle := self.median(peer)) is not None}
        best = max if self.metric.more_is_better else min
        return best(found, key=found.__getitem__) if found else None

    def beside(self) -> list[str]:
        """The cells of the table of peers."""
        best = self.best_peer()
        ratio = f"{self._times(self.ratio(best))} {best}" if best else ""
        limit = self._limit(self.metric.beside, against=best) if best else ""
        return [
            self.metric.label,
            *(self._values(subject) for subject in ("published", *PEERS, "ours")),
            ratio,
            limit,
            self._values("in-process"),
        ]

    def cells(self) -> list[str]:
        metric = self.metric
        vs_engine = self.ratio("in-process")
        bound = self._limit(metric.bound, against="in-process") if metric.bound else ""
        return [
            metric.label,
            self._values("published"),
            self._values("ours"),
            self._times(self.ratio("published")),
            self._limit(metric.required),
            self._limit(metric.aim),
            self._values("in-process"),
            " ".join(filter(None, [self._times(vs_engine), bound and f"({bound})"])),
        ]

    def as_json(self) -> dict[str, Any]:
        metric, best = self.metric, self.best_peer()
        return {
            "workload": self.workload,
            "metric": metric.key,
            "label": metric.label.strip(),
            "unit": metric.unit,
            "more_is_better": metric.more_is_better,
            "samples": self.values,
            "median": {subject: self.median(subject) for subject in self.values},
            "ratio": self.ratio("published"),
            "absolute": metric.absolute,
            "required": metric.required,
            "required_met": self.met(metric.required),
            "aim": metric.aim,
            "aim_met": self.met(metric.aim),
            "ours_vs_in_process": self.ratio("in-process"),
            "bound": metric.bound,
            "bound_met": self.met(metric.bound, against="in-process"),
            "best_peer": best,
            "ours_vs_best_peer": self.ratio(best) if best else None,
            "beside": metric.beside,
            "beside_met": self.met(metric.beside, against=best) if best else None,
        }

    def _values(self, subject: str) -> str:
        values = self.values.get(subject)
        if values is None:
            return ""
        if not values:
            return "failed"
        middle = f"{_figure(median(values))} {self.metric.unit}"
        if len(values) == 1:
            return middle
        return f"{middle} ({_figure(min(values))}-{_figure(max(values))})"

    def _limit(self, limit: float | None, *, against: str = "published") -> str:
        if limit is None:
            return ""
        sign = "≥" if self.metric.more_is_better else "≤"
        text = f"{limit:g} {self.metric.unit}" if self.metric.absolute else self._times(limit)
        mark = {True: " ✓", False: " ✗", None: ""}[self.met(limit, against=against)]
        return f"{sign} {text}{mark}"

    def _times(self, ratio: float | None) -> str:
        if ratio is None:
            return ""
        if ratio < 0.5 and not self.metric.more_is_better:
            return f"1/{_figure(1 / ratio)}"
        return f"{_figure(ratio)}x"


def rows(sheet: Sheet) -> list[Row]:
    """The metrics of all that was measured."""
    found = []
    for workload in WORKLOADS:
        samples = sheet.samples.get(workload.name, {})
        for metric in workload.metrics:
            values = {
                subject: [sample[metric.key] for sample in samples[subject]]
                for subject in SUBJECTS
                if subject in samples
                # Not all are written in Python, for one.
                and all(metric.key in sample for sample in samples[subject])
            }
            if values:
                found.append(Row(workload.name, metric, values))
    return found


def table(sheet: Sheet) -> str:
    """The tables of one DuckDB series: medians, with least and greatest value in brackets."""
    ours = sheet.versions["ours"]
    found = rows(sheet)
    text = [
        f"DuckDB {ours['duckdb']}, pyarrow {ours['pyarrow']}, Python {ours['python']}: "
        f"{', '.join(f'{subject} {version}' for subject, version in versions(sheet).items())}",
        "",
        *_aligned([COLUMNS, *(row.cells() for row in found)]),
    ]
    if compared := [row.beside() for row in found if row.best_peer()]:
        text += ["", *_aligned([BESIDE, *compared])]
    if sheet.counts:
        text += ["", *guard.lines(sheet.counts, sheet.duckdb)]
    text += [f"! {problem}" for problem in [*sheet.failures, *sheet.remarks]]
    return "\n".join(text)


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
                "curves": curves(sheet),
                "counts": sheet.counts,
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


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
