"""What the samples of a workload say: medians, ratios, and which limits are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .figures import figure, ranged, times
from .plan import PEERS, SUBJECTS, WORKLOADS, Metric
from .session import Sheet


@dataclass(frozen=True)
class Demand:
    """A limit of ours / `against`, or of ours itself where that is empty.

    `found` is what it is, and `met` is None where there is nothing to compare.
    """

    kind: str
    against: str
    limit: float
    found: float | None
    met: bool | None
    text: str

    def marked(self) -> str:
        return self.text + {True: " ✓", False: " ✗", None: ""}[self.met]


@dataclass(frozen=True)
class Row:
    """One metric of one workload, with its values by subject; `missing` says why there are none.

    `name` is its label after that of the first metric of the workload.
    """

    workload: str
    name: str
    metric: Metric
    values: dict[str, list[float]]
    missing: dict[str, str] = field(default_factory=dict)

    def median(self, subject: str) -> float | None:
        values = self.values.get(subject)
        return median(values) if values else None

    def ratio(self, base: str | None) -> float | None:
        """Ours / base, of the medians. Less than nothing counts as next to nothing."""
        ours, other = self.median("ours"), self.median(base) if base else None
        if ours is None or other is None:
            return None
        return max(ours, 1e-3) / max(other, 1e-3)

    def best_peer(self) -> str | None:
        """The peer with the best median."""
        found = {peer: middle for peer in PEERS if (middle := self.median(peer)) is not None}
        best = max if self.metric.more_is_better else min
        return best(found, key=found.__getitem__) if found else None

    def demands(self) -> Iterator[Demand]:
        """All that is asked of this metric."""
        metric = self.metric
        usual = "" if metric.absolute else "published"
        for kind, against, limit in (
            ("required", usual, metric.required),
            ("aim", usual, metric.aim),
            ("aim", "in-process", metric.bound),
            ("aim", self.best_peer() or "peers", metric.beside),
        ):
            if limit is not None:
                yield self._demand(kind, against, limit)

    def _demand(self, kind: str, against: str, limit: float) -> Demand:
        more = self.metric.more_is_better
        found = self.ratio(against) if against else self.median("ours")
        met = None if found is None else found >= limit if more else found <= limit
        size = times(limit, more) if against else f"{limit:g} {self.metric.unit}"
        return Demand(kind, against, limit, found, met, f"{'≥' if more else '≤'} {size}")

    def missed(self) -> Iterator[str]:
        """The limits that are not kept, in words."""
        for demand in self.demands():
            if demand.met is False and demand.found is not None:
                found = f"{figure(demand.found)} {self.metric.unit}"
                if demand.against:
                    found = f"{self.times(demand.against)} of {demand.against}"
                yield f"{self.name}: {found}, {demand.kind} {demand.text}"

    def cell(self, subject: str) -> str:
        """The values of a subject, or why there are none."""
        if subject not in self.values:
            return ""
        if not self.values[subject]:
            return self.missing.get(subject, "failed")
        return ranged(self.values[subject], self.metric.unit)

    def times(self, base: str | None) -> str:
        """Ours / base, as text."""
        ratio = self.ratio(base)
        return "" if ratio is None else times(ratio, self.metric.more_is_better)

    def limits(self, against: str | None, kind: str = "") -> str:
        """The limits of ours / `against`, or of ours where there is nothing to compare."""
        wanted = ("", "published") if against == "published" else (against,)
        return ", ".join(
            demand.marked()
            for demand in self.demands()
            if demand.against in wanted and kind in ("", demand.kind)
        )

    def as_json(self) -> dict[str, Any]:
        metric, best = self.metric, self.best_peer()
        return {
            "workload": self.workload,
            "metric": metric.key,
            "label": metric.label.strip(),
            "name": self.name,
            "unit": metric.unit,
            "more_is_better": metric.more_is_better,
            "samples": self.values,
            "missing": {name: self.cell(name) for name, found in self.values.items() if not found},
            "median": {subject: self.median(subject) for subject in self.values},
            "best_peer": best,
            "ratios": {base: self.ratio(base) for base in self.values if base != "ours"},
            "demands": [vars(demand) for demand in self.demands()],
        }


def rows(sheet: Sheet) -> list[Row]:
    """The metrics of all that was measured."""
    found = []
    for workload in WORKLOADS:
        samples = sheet.samples.get(workload.name, {})
        missing = sheet.missing.get(workload.name, {})
        first = workload.metrics[0].label
        for metric in workload.metrics:
            values = {
                subject: [one[metric.key] for one in samples[subject] if metric.key in one]
                for subject in SUBJECTS
                if subject in samples
            }
            # Not all are written in Python, for one.
            values = {name: some for name, some in values.items() if some or name in missing}
            if values:
                label = metric.label.strip()
                name = label if metric.label == label else f"{first}: {label}"
                found.append(Row(workload.name, name, metric, values, missing))
    return found
