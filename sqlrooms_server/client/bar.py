"""Showing progress: to a function, in a terminal, in a notebook.

The bars are a few lines each. A library for them would bring its own dependencies, and for
notebooks the widgets of the front end, which this needs not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

from sqlrooms_server.client.replies import Progress

# A query that is done before has no bar.
_DELAY_MS = 500
_WIDTH = 30


class Reporter:
    """Shows nothing. ``clear`` takes away what was shown, before others write there."""

    is_wanted = False

    def show(self, progress: Progress) -> None: ...

    def clear(self) -> None: ...


def reporter(progress: bool | Callable[[Progress], None] | None) -> Reporter:
    """What shows ``progress``: a function, or with True a bar where somebody can see it."""
    if callable(progress):
        return _Callback(progress)
    if progress:
        if _is_notebook():
            return NotebookBar()
        if sys.stderr is not None and sys.stderr.isatty():
            return TerminalBar(sys.stderr)
    return Reporter()


class _Callback(Reporter):
    is_wanted = True

    def __init__(self, callback: Callable[[Progress], None]) -> None:
        self._callback = callback

    def show(self, progress: Progress) -> None:
        self._callback(progress)


class TerminalBar(Reporter):
    """One line that is written over and over."""

    is_wanted = True

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_shown = False

    def show(self, progress: Progress) -> None:
        if progress.queued_ms + progress.running_ms >= _DELAY_MS:
            filled = round(_WIDTH * (progress.percent or 0) / 100)
            line = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {describe(progress)}"
            self._write(f"\r{line}\x1b[K")
            self._is_shown = True

    def clear(self) -> None:
        if self._is_shown:
            self._write("\r\x1b[K")
            self._is_shown = False

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class NotebookBar(Reporter):
    """An output of the cell that is updated; needs nothing but IPython, which is there."""

    is_wanted = True

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, progress: Progress) -> None:
        if progress.queued_ms + progress.running_ms < _DELAY_MS:
            return
        from IPython.display import HTML, display

        value = "" if progress.percent is None else f'value="{progress.percent:.0f}"'
        shown = HTML(f'<progress max="100" {value}></progress> {describe(progress)}')
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)

    def clear(self) -> None:
        if self._handle is not None:
            from IPython.display import HTML

            self._handle.update(HTML(""))
            self._handle = None


def describe(progress: Progress) -> str:
    """Progress in words: ``"45 %, 12 s"``."""
    if progress.state == "queued":
        ahead = "" if progress.position is None else f", {progress.position} before it"
        return f"waiting{ahead}, {progress.queued_ms / 1000:.0f} s"
    percent = "running" if progress.percent is None else f"{progress.percent:.0f} %"
    return f"{percent}, {progress.running_ms / 1000:.0f} s"


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"
