"""The directories that restricted clients can read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sqlrooms_server.errors import StartupError

_WILDCARD = re.compile(r"[*?\[{]")


class Directories:
    """Directories and what is below them. Raises ``StartupError`` for one that is not there."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._roots = []
        for path in paths:
            root = Path(path).resolve()
            if not root.is_dir():
                raise StartupError(f"--allow-dir: {path} is no directory; create it, or drop it.")
            self._roots.append(root)

    def __bool__(self) -> bool:
        return bool(self._roots)

    def __iter__(self) -> Iterator[str]:
        return iter([str(root) for root in self._roots])

    def __contains__(self, path: str) -> bool:
        """Whether the file, or all files that match the pattern, ``path`` are in them.

        Of a pattern, what stands before the first wildcard decides, and it must not climb.
        """
        parts = Path(path).parts
        if ".." in parts or not os.path.isabs(path):
            return False
        plain = []
        for part in parts:
            if _WILDCARD.search(part):
                break
            plain.append(part)
        place = Path(*plain).resolve()
        return any(place == root or root in place.parents for root in self._roots)

    def __str__(self) -> str:
        return ", ".join(self) or "no directory"

    def refuse(self, name: str, path: str) -> None:
        """Raise ``StartupError`` when ``path``, a file of the server, lies in one of them."""
        place = Path(path).resolve()
        for root in self._roots:
            if place == root or root in place.parents:
                raise StartupError(
                    f"--allow-dir {root} would let clients read {name} {place}, a file of the "
                    "server; move one of them."
                )
