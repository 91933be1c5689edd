"""Plugins for the servers that are measured: hooks that do nothing, and a handler that sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlrooms_server import Action, Client, Outcome, Plugin, Query

hooks = Plugin("hooks")
guard = Plugin("guard")
sleeper = Plugin("sleeper")


@hooks.hook
def prepare_cursor(cursor: Any, client: Client) -> None: ...


@hooks.hook
def around_query(query: Query, run: Callable[[Query], Any]) -> Any:
    return run(query)


@hooks.hook
def query_done(query: Query, outcome: Outcome) -> None: ...


@guard.hook
def authorize(client: Client, action: Action) -> None: ...


@sleeper.on("sleep")
def sleep(call: Any) -> None:
    time.sleep(call.message["seconds"])
