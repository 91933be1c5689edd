"""What is fuzzed: bytes in, and an exception when something that must hold does not."""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

NAMES = ("protocol", "uploads", "sql", "session")

# For texts of at most 200 KB. What grows with the square of their length takes minutes; what
# is instrumented takes ten times as long as it should.
_MAX_CPU_SECONDS = 2.0


class Broken(AssertionError):
    """Something that must hold does not."""


class Target(Protocol):
    max_size: int

    def seeds(self) -> Iterator[bytes]:
        """Inputs to begin with: each kind of what is valid."""

    def mutated(self, data: bytes, chance: random.Random) -> bytes:
        """Another input made of ``data``, which any input may be, still well-formed mostly."""

    def try_one(self, data: bytes) -> None:
        """Raise :class:`Broken`, or whatever should not be raised."""


def load(name: str) -> Target:
    """The target of that name, which imports what it tries."""
    target: Target = importlib.import_module(f"{__package__}.{name}").make()
    return target


def require(condition: object, text: str) -> None:
    if not condition:
        raise Broken(text)


@contextmanager
def in_linear_time(what: str) -> Iterator[None]:
    """The block must not take long in this thread, whatever other processes do."""
    began = time.thread_time()
    yield
    took = time.thread_time() - began
    require(took < _MAX_CPU_SECONDS, f"{what} took {took:.1f} s of CPU time")
