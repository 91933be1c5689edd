"""The files of large values, named as diskcache names them: ``ab/cd/<28 hex digits>.val``.

Names come from a database that somebody else may have written. Each step of a path is opened from
the one before it and may not be a symbolic link, so that nothing outside the directory is reached.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from typing import Any

from sqlrooms_server.cache.entries import OpenFile

_NAME = re.compile(r"([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{28}\.val)", re.ASCII)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A pipe would block whoever opens it.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def open_value(directory: str, name: Any) -> OpenFile:
    """Raises ``OSError``, and ``ValueError`` for a name that diskcache does not make."""
    outer, inner, leaf = _split(name)
    with _folders(directory, outer, inner) as folders:
        file = OpenFile(os.open(leaf, _READ_FLAGS, dir_fd=folders[-1]))
    if not file.is_regular():
        raise ValueError(f"{name} in the result cache is not a file.")
    return file


def create_value(directory: str) -> tuple[str, OpenFile]:
    """A new name and its file. Raises ``OSError``."""
    digits = secrets.token_hex(16)
    name = f"{digits[:2]}/{digits[2:4]}/{digits[4:]}.val"
    outer, inner, leaf = _split(name)
    with _folders(directory, outer, inner, create=True) as folders:
        return name, OpenFile(os.open(leaf, _NEW_FLAGS, 0o600, dir_fd=folders[-1]))


def remove_value(directory: str, name: Any) -> None:
    """Remove the file and its folders when they are empty; whatever is not there is no error."""
    with contextlib.suppress(OSError, ValueError):
        outer, inner, leaf = _split(name)
        with _folders(directory, outer, inner) as folders:
            top, middle, bottom = folders
            os.unlink(leaf, dir_fd=bottom)
            os.rmdir(inner, dir_fd=middle)
            os.rmdir(outer, dir_fd=top)


def open_unnamed(directory: str) -> OpenFile:
    """A file that is gone with its last user. Raises ``OSError``."""
    path = os.path.join(directory, f"spool-{secrets.token_hex(8)}")
    file = OpenFile(os.open(path, _NEW_FLAGS, 0o600))
    os.unlink(path)
    return file


def _split(name: Any) -> tuple[str, str, str]:
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError("A file name in the result cache was not made by it.")
    return match[1], match[2], match[3]


@contextlib.contextmanager
def _folders(directory: str, *names: str, create: bool = False) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        opened: list[int] = []
        for name in (directory, *names):
            parent = opened[-1] if opened else None
            if create and parent is not None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=parent)
            opened.append(os.open(name, _FOLDER_FLAGS, dir_fd=parent))
            stack.callback(os.close, opened[-1])
        yield opened
