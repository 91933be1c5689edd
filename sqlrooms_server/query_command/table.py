"""A result as an aligned table for people: its first and last rows, cut to a width."""

from __future__ import annotations

import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from sqlrooms_server.query_command.cells import texts

# What fits a screen or two: half of them from the start, half from the end.
_MOST_ROWS = 40
_NARROWEST = 8
_GAP = "  "
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class TablePreview:
    """The first and last rows of a result of any size."""

    def __init__(self, schema: pa.Schema) -> None:
        self.num_rows = 0
        self._schema = schema
        self._head: list[pa.RecordBatch] = []
        self._tail: deque[pa.RecordBatch] = deque()
        self._tail_rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Look at the next batch."""
        if self.num_rows < _MOST_ROWS:
            self._head.append(batch.slice(0, _MOST_ROWS - self.num_rows))
        self.num_rows += batch.num_rows
        self._tail.append(batch)
        self._tail_rows += batch.num_rows
        while self._tail_rows - self._tail[0].num_rows >= _MOST_ROWS // 2:
            self._tail_rows -= self._tail.popleft().num_rows

    def lines(self, width: int | None, is_styled: bool) -> list[str]:
        """The table, at most ``width`` columns of the screen wide, None for no limit."""
        half = _MOST_ROWS // 2
        table = pa.Table.from_batches(self._head, self._schema)
        is_cut = self.num_rows > _MOST_ROWS
        if is_cut:
            tail = pa.Table.from_batches(list(self._tail), self._schema)
            table = pa.concat_tables([table.slice(0, half), tail.slice(tail.num_rows - half)])
        columns = [
            _Column.of(name, table.column(index), half if is_cut else None)
            for index, name in enumerate(self._schema.names)
        ]
        return _lines(columns, width, is_styled)


@dataclass
class _Column:
    name: str
    cells: list[str | None]
    is_number: bool

    @staticmethod
    def of(name: str, values: pa.ChunkedArray, cut: int | None) -> _Column:
        cells: list[str | None] = []
        for chunk in values.chunks:
            cells += [None if cell is None else _printable(cell) for cell in texts(chunk)]
        if cut is not None:
            cells.insert(cut, "…")
        kind = values.type
        is_number = (
            pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        )
        return _Column(_printable(name), cells, is_number)

    def width(self) -> int:
        return max(map(_width, (self.name, *(cell or "NULL" for cell in self.cells))))


def _lines(columns: Sequence[_Column], width: int | None, is_styled: bool) -> list[str]:
    if not columns:
        return []
    widths = [column.width() for column in columns]
    note = ""
    if width is not None:
        widths = _fitting(widths, width)
        if len(widths) < len(columns):
            note = f"({len(widths)} of {len(columns)} columns are shown)"
    columns = columns[: len(widths)]
    head = [_aligned(c.name, w, c.is_number) for c, w in zip(columns, widths, strict=True)]
    lines = [_GAP.join(head), _GAP.join("─" * w for w in widths)]
    for row in range(len(columns[0].cells)):
        cells = []
        for column, cell_width in zip(columns, widths, strict=True):
            cell = column.cells[row]
            shown = _aligned("NULL" if cell is None else cell, cell_width, column.is_number)
            cells.append(f"{_DIM}{shown}{_PLAIN}" if cell is None and is_styled else shown)
        lines.append(_GAP.join(cells))
    return [line.rstrip() for line in lines] + ([note] if note else [])


def _fitting(widths: list[int], width: int) -> list[int]:
    """Widths that fit: the widest columns are cut first, then the last ones are left out."""
    while len(widths) > 1 and sum(min(w, _NARROWEST) + len(_GAP) for w in widths) > width:
        widths = widths[:-1]
    room = max(1, width - len(_GAP) * (len(widths) - 1))
    limit = max(widths)
    while limit > 1 and sum(min(w, limit) for w in widths) > room:
        limit -= 1
    return [min(w, limit) for w in widths]


def _aligned(cell: str, width: int, is_right: bool) -> str:
    if _width(cell) > width:
        kept = ""
        for character in cell:
            if _width(kept + character) > width - 1:
                break
            kept += character
        cell = f"{kept}…"
    space = " " * (width - _width(cell))
    return space + cell if is_right else cell + space


def _width(cell: str) -> int:
    """Columns of the screen: letters of East Asia take two, accents none."""
    if cell.isascii():
        return len(cell)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in cell
    )


def _printable(cell: str) -> str:
    """``cell`` on one line, and without what a terminal would obey."""
    if cell.isprintable():
        return cell
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cell)
