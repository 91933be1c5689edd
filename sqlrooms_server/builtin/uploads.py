"""Files that come over HTTP: there when they are complete, and nothing is left when they are not.

On Linux a file under way has no name at all. Elsewhere, and on file systems that cannot do that, it
has a hidden one and a lock, so that what a server that was killed left behind can be told from what
is under way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
import threading
from collections.abc import Iterator

from sqlrooms_server.builtin.beneath import Root, explained
from sqlrooms_server.errors import Cancelled, Conflict, TooLarge

_PREFIX = ".sqlrooms-upload-"
_MODE = 0o666
# Of a file without a name: those of file systems that have none.
_NO_SUCH_FILES = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class Upload:
    """A file on its way to ``names`` beneath ``root``. From any thread, one call at a time.

    Raises ``NotFound`` without its directory, and ``Conflict`` when something else has its name.
    """

    def __init__(self, root: Root, names: tuple[str, ...], max_size: int) -> None:
        self._root = root
        self._names = names
        self._name = names[-1]
        self._max_size = max_size
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._temporary = ""
        self._directory = self._descriptor = -1
        self.size = 0
        self.is_new = True

    def begin(self) -> None:
        """Look whether it can be there, and make room for it."""
        with self._lock:
            self._check()
            with self._root.directory(self._names[:-1]) as directory:
                self._directory = os.dup(directory)
            with explained():
                self.is_new = self._is_free()
                _remove_abandoned(self._directory)
                self._create()

    def write(self, data: bytes) -> None:
        """Add ``data``. Raises ``TooLarge``."""
        with self._lock:
            self._check()
            self.size += len(data)
            check_size(self.size, self._max_size)
            rest = memoryview(data)
            with explained():
                while len(rest):
                    rest = rest[os.write(self._descriptor, rest) :]

    def finish(self, *, replaces: bool) -> os.stat_result:
        """Let it have its name; without ``replaces``, only if no other file has it."""
        with self._lock, explained():
            self._check()
            os.fsync(self._descriptor)
            # Others may have made it since this began.
            self.is_new = self._is_free()
            if not self._temporary:
                if not replaces:
                    self._link(self._name)
                    return os.fstat(self._descriptor)
                self._temporary = _random_name()
                self._link(self._temporary)
            if replaces:
                self._rename()
            else:
                os.link(
                    self._temporary,
                    self._name,
                    src_dir_fd=self._directory,
                    dst_dir_fd=self._directory,
                )
            return os.fstat(self._descriptor)

    def abandon(self) -> None:
        """Leave nothing of it, unless it has its name. Waits for a write under way."""
        with self._lock:
            self._is_abandoned = True
            temporary, self._temporary = self._temporary, ""
            if temporary:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=self._directory)
            for descriptor in (self._descriptor, self._directory):
                if descriptor >= 0:
                    os.close(descriptor)
            self._descriptor = self._directory = -1

    def _check(self) -> None:
        if self._is_abandoned:
            raise Cancelled("The upload was given up.")

    def _create(self) -> None:
        if sys.platform == "linux":
            try:
                flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
                self._descriptor = os.open(".", flags, _MODE, dir_fd=self._directory)
            except OSError as error:
                if error.errno not in _NO_SUCH_FILES:
                    raise
        if self._descriptor < 0:
            self._temporary = _random_name()
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._temporary, flags, _MODE, dir_fd=self._directory)
        _locks(self._descriptor)

    def _is_free(self) -> bool:
        """Whether nothing has the name yet. Raises ``Conflict`` when it is no file that has it."""
        try:
            about = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return True
        if not stat.S_ISREG(about.st_mode):
            raise Conflict("Something that is no file has that name.")
        return False

    def _link(self, name: str) -> None:
        source = f"/proc/self/fd/{self._descriptor}"
        os.link(source, name, dst_dir_fd=self._directory, follow_symlinks=True)

    def _rename(self) -> None:
        os.replace(
            self._temporary,
            self._name,
            src_dir_fd=self._directory,
            dst_dir_fd=self._directory,
        )
        self._temporary = ""


def check_size(size: int, limit: int) -> None:
    """Raise ``TooLarge`` when a file of ``size`` bytes, or more, is over ``limit``."""
    if size > limit:
        raise TooLarge(f"The file has more than {limit} bytes (--max-file-size).")


def _random_name() -> str:
    return _PREFIX + secrets.token_hex(8)


def _locks(descriptor: int) -> bool:
    """Whether nobody else has the lock of a file, which its writer keeps as long as it lives."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(directory: int) -> None:
    """Remove what servers that were killed left in ``directory``."""
    for name in _hidden(directory):
        with contextlib.suppress(OSError):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                if _locks(descriptor):
                    os.unlink(name, dir_fd=directory)
            finally:
                os.close(descriptor)


def _hidden(directory: int) -> Iterator[str]:
    with os.scandir(directory) as found:
        for entry in found:
            if entry.name.startswith(_PREFIX) and entry.is_file(follow_symlinks=False):
                yield entry.name
