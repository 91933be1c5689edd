"""A Unix socket to listen on: what may be in its place, who may connect, and its end.

uWebSockets removes whatever is at the path, a file or the socket of another server too, makes a
socket that only its owner can connect to, and leaves it behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import sys

from sqlrooms_server.errors import StartupError

# What the system has room for, without the zero at the end.
_LONGEST_PATH = 107 if sys.platform == "linux" else 103


class UnixSocket:
    """The socket at ``path``, whose permissions are ``mode`` from the moment others may use it."""

    def __init__(self, path: str, mode: int = 0o600) -> None:
        self.path = os.path.abspath(path)
        self._mode = mode
        self._made: tuple[int, int] | None = None

    def make_room(self) -> None:
        """Remove a socket that nobody listens on. Raises ``StartupError`` when it must stay."""
        if not hasattr(socket, "AF_UNIX"):
            raise StartupError("--unix-socket: this system has no Unix sockets.")
        size = len(os.fsencode(self.path))
        if size > _LONGEST_PATH:
            raise StartupError(
                f"--unix-socket {self.path} has {size} bytes; the system allows {_LONGEST_PATH}."
            )
        try:
            found = os.lstat(self.path)
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise StartupError(f"--unix-socket {self.path}: {error.strerror}.") from error
        if found is not None:
            if not stat.S_ISSOCK(found.st_mode):
                raise StartupError(
                    f"--unix-socket {self.path} is there and no socket; choose another path."
                )
            self._remove_stale()
        self._try()

    def made(self) -> None:
        """It is there: remember which one it is, and let those in who may come."""
        os.chmod(self.path, self._mode)
        self._made = _identity(self.path)

    def remove(self) -> None:
        """Remove it, unless it is that of another server by now."""
        made, self._made = self._made, None
        with contextlib.suppress(OSError):
            if made is not None and _identity(self.path) == made:
                os.unlink(self.path)

    def _remove_stale(self) -> None:
        with socket.socket(socket.AF_UNIX) as probe:
            # A server that is busy does not accept at once.
            probe.setblocking(False)
            reason = probe.connect_ex(self.path)
        if reason == errno.ECONNREFUSED:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        elif reason in (0, errno.EAGAIN, errno.EINPROGRESS):
            raise StartupError(
                f"Another server listens on --unix-socket {self.path}; stop it, or choose another."
            )
        else:
            raise StartupError(f"--unix-socket {self.path} is in use: {os.strerror(reason)}.")

    def _try(self) -> None:
        """uWebSockets does not say why it cannot listen, so it is tried in Python first."""
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(self.path)
            os.unlink(self.path)
        except OSError as error:
            raise StartupError(
                f"Cannot make --unix-socket {self.path}: {error.strerror or error}."
            ) from error


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
