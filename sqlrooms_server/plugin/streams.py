"""What a stream of a plugin is: batches in by name, batches out by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stream:
    """Begins with a message of the type ``kind``; its inputs and outputs are Arrow IPC streams."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def stream_of(kind: str, inputs: Sequence[str], outputs: Sequence[str]) -> Stream:
    """The stream ``kind``. Raises ``ValueError`` for names that cannot be told apart."""
    for what, names in (("inputs", inputs), ("outputs", outputs)):
        if isinstance(names, str):
            raise ValueError(f"Stream {kind!r}: {what} must be a list of names, not {names!r}.")
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"Stream {kind!r}: {what} must be names, not {list(names)!r}.")
        if len(set(names)) != len(names):
            raise ValueError(f"Stream {kind!r}: two of the {what} {list(names)!r} are the same.")
    return Stream(kind, tuple(inputs), tuple(outputs))


def check_handler(stream: Stream, handler: Callable[..., Any]) -> None:
    """Raise ``ValueError`` unless ``handler`` is a class or coroutine function for ``stream``."""
    if not isinstance(handler, type):
        if not inspect.iscoroutinefunction(handler):
            raise ValueError(
                f"Stream {stream.kind!r} needs a class with on_batch(batch, name), or an async "
                "function."
            )
        return
    if not callable(getattr(handler, "on_batch", None)):
        raise ValueError(
            f"Stream {stream.kind!r}: {handler.__name__} needs a method on_batch(batch, name)."
        )
    if not stream.inputs:
        raise ValueError(
            f"Stream {stream.kind!r} has no inputs, so {handler.__name__} would never be called; "
            "use an async function."
        )
