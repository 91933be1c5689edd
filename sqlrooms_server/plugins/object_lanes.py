"""What of objects may run at one time for one connection."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sqlrooms_server.jobs import Lane


class Lanes:
    """What one connection may hold up: threads, coroutines, and tables that it reads slowly."""

    def __init__(self) -> None:
        self.functions = Lane(4)
        self.coroutines = Lane(256)
        self.tables = Lane(32)

    def of(self, function: Callable[..., Any]) -> Lane:
        """Where to call ``function``."""
        is_async = inspect.iscoroutinefunction(function)
        return self.coroutines if is_async else self.functions
