"""Which path belongs to whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from urllib.parse import unquote

T = TypeVar("T")


class Mounts(Generic[T]):
    """``others`` have their paths and all below them, the longest one wins; ``main`` has the rest.

    A path counts as it is written: ``/%73ales`` is not ``/sales``. A proxy may read it otherwise,
    and let somebody pass who should not; so what would then belong to another is nobody's.
    """

    def __init__(self, main: T, others: Mapping[str, T]) -> None:
        self._main = main
        # Each path, what all below it begin with, and whose it is; the longest first.
        self._others = sorted(
            ((path, f"{path}/", other) for path, other in others.items()),
            key=lambda item: -len(item[0]),
        )

    def find(self, path: str) -> tuple[T, str] | None:
        """Whose ``path`` is, and what follows theirs; None when it is nobody's."""
        if not self._others:
            return self._main, path
        found = self._as_written(path)
        if _is_plain(path) or found[0] is self._as_written(_normalised(path))[0]:
            return found
        return None

    def around(self, path: str) -> tuple[T, str]:
        """Who would have ``path`` if nothing was mounted there, and how that one sees it."""
        others = {place: other for place, _, other in self._others if place != path}
        return Mounts(self._main, others)._as_written(path)

    def _as_written(self, path: str) -> tuple[T, str]:
        for place, below, other in self._others:
            if path == place or path.startswith(below):
                return other, path[len(place) :]
        return self._main, path


def _is_plain(path: str) -> bool:
    return not any(mark in path for mark in ("%", "//", "/.", "\\"))


def _normalised(path: str) -> str:
    """``path`` as somebody reads it who is less strict."""
    segments: list[str] = []
    for segment in unquote(path).replace("\\", "/").split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    return "/" + "/".join(segments)
