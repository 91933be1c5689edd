"""What is kept of tokens, and the files of tokens and keys, which are read again while the server
runs."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from sqlrooms_server.errors import StartupError

# Ten thousand tokens take 2 MB.
_MAX_BYTES = 16 << 20


def digest_of(token: str) -> bytes:
    """The SHA-256 of ``token``, which is what is kept of it."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_key_file(path: Path, what: str) -> bytes:
    """The contents of ``path``, which errors call ``what``. Raises ``StartupError``.

    Never waits for somebody to write, as a pipe would have it: nothing else could stop the server
    meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise StartupError(f"Cannot read the {what} {path}: it is no regular file.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(_MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StartupError(f"Cannot read the {what} {path}: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise StartupError(f"The {what} {path} has more than {_MAX_BYTES} bytes.")
    return data
