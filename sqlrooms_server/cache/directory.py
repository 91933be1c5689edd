"""The private directory of one cache: where it is, whose it is, and what of it is kept."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from sqlrooms_server.errors import StartupError

log = logging.getLogger(__name__)

MEMORY = ":memory:"

_LOCK = "lock"
_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 << 20
_TEMPORARY = "sqlrooms-cache-"
_ATTEMPTS = 10


class Unusable(Exception):
    """A directory that is not private to this user; the text says why."""


class Place:
    """Where the cache of ``name``, a database path, belongs below ``given`` or its default."""

    def __init__(self, given: str, name: str) -> None:
        self.given = given
        self.parent = os.path.abspath(given) if given else _default_parent()
        self.leaf: str | None = None
        if name != MEMORY:
            digest = hashlib.sha256(os.path.abspath(name).encode("utf-8", "surrogateescape"))
            self.leaf = os.path.join(self.parent, digest.hexdigest()[:16])

    def existing(self) -> Directory | None:
        """The directory when it exists and no other server uses it. Creates nothing.

        Raises ``StartupError`` when the directory the user named cannot be used.
        """
        _remove_abandoned(self.parent)
        try:
            if self.leaf is not None and os.path.lexists(self.leaf):
                return Directory.lock(self.leaf)
            if self.given:
                _check_parent(self.parent)
        except (OSError, Unusable) as error:
            if self.given:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise StartupError(
                    f"Cannot use the cache directory {self.leaf or self.parent}: {reason}; "
                    "choose another --cache-dir."
                ) from error
        return None

    def create(self) -> Directory:
        """The directory, or a temporary one when it cannot be used. Raises ``OSError``."""
        try:
            os.makedirs(self.parent, 0o700, exist_ok=True)
            if self.leaf is not None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.leaf, 0o700)
                directory = Directory.lock(self.leaf)
                if directory is not None:
                    return directory
            return Directory.temporary(self.parent)
        except (OSError, Unusable) as error:
            directory = Directory.temporary(tempfile.gettempdir())
            log.warning("The result cache is in %s: %s.", directory.path, error)
            return directory


class Directory:
    """A directory that this process holds the lock of."""

    def __init__(self, path: str, lock: int, *, is_temporary: bool = False) -> None:
        self.path = path
        self.is_temporary = is_temporary
        self.was_private = True
        self._lock: int | None = lock
        self._status = os.lstat(path)

    @classmethod
    def lock(cls, path: str) -> Directory | None:
        """That at ``path``, None when another server holds it. Raises ``Unusable``, ``OSError``."""
        status = os.lstat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise Unusable("it is not a directory")
        if status.st_uid != os.geteuid():
            raise Unusable("it belongs to another user")
        lock = _take_lock(path)
        if lock is None:
            return None
        directory = cls(path, lock)
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.chmod(path, 0o700)
            directory.was_private = not status.st_mode & 0o022
        return directory

    @classmethod
    def temporary(cls, parent: str) -> Directory:
        """A new one that is removed with :meth:`close`. Raises ``OSError``."""
        _remove_abandoned(parent)
        for _ in range(_ATTEMPTS):
            path = tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent)
            # Another server may just be removing it as abandoned.
            with contextlib.suppress(FileNotFoundError):
                lock = _take_lock(path)
                if lock is not None:
                    return cls(path, lock, is_temporary=True)
        raise OSError(f"No temporary directory stays in {parent}.")

    def check(self) -> None:
        """Raises ``OSError`` when something else, or nothing, is in its place now."""
        if not os.path.samestat(self._status, os.lstat(self.path)):
            raise OSError("the directory was replaced")

    def clear(self) -> None:
        """Remove everything but the lock. Raises ``OSError``."""
        self.check()
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                elif entry.name != _LOCK:
                    os.unlink(entry.path)

    def take_manifest(self) -> Any:
        """What the last clean stop wrote, once. None when there is nothing to trust."""
        path = os.path.join(self.path, _MANIFEST)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                text = file.read(_MAX_MANIFEST_BYTES)
        except OSError:
            text = b""
        try:
            os.unlink(path)
            _sync(self.path)
            return json.loads(text) if self.was_private else None
        except (OSError, ValueError, RecursionError):
            return None

    def write_manifest(self, value: Any) -> None:
        """Raises ``OSError``; ``TypeError`` for what is not JSON."""
        text = json.dumps(value)
        path = os.path.join(self.path, _MANIFEST)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path + ".new", flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
        _sync(self.path)

    def close(self) -> None:
        if self._lock is not None:
            if self.is_temporary:
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _default_parent() -> str:
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return os.path.join(base, "sqlrooms-server")


def _check_parent(path: str) -> None:
    existing = Path(path)
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise Unusable(f"{existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Unusable(f"{existing} cannot be written to")


def _take_lock(directory: str) -> int | None:
    """A descriptor that holds the lock of ``directory``, None when somebody else does."""
    path = os.path.join(directory, _LOCK)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed the file in the meantime.
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_abandoned(parent: str) -> None:
    """Remove the temporary directories of processes that were killed."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if not entry.name.startswith(_TEMPORARY) or not entry.is_dir(follow_symlinks=False):
                continue
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            with contextlib.suppress(OSError):
                if not os.listdir(entry.path):
                    os.rmdir(entry.path)
                    continue
                lock = _take_lock(entry.path)
                if lock is not None:
                    shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(lock)


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
