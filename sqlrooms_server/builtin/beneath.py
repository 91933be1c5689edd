"""Files beneath a directory, and no others: whatever is asked for, and whatever changes meanwhile.

Each name on the way is opened in the directory before it, and none may be a symbolic link, so that
nothing lies between the check and the use.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from sqlrooms_server.db.sandbox import private_files
from sqlrooms_server.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    ServerError,
    StartupError,
)
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.settings import Settings

# Of a name, as most file systems have it, and of a whole path.
_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 4096

# Control characters, what separates names elsewhere, and halves of surrogate pairs, which stand for
# bytes that are no UTF-8.
_BAD = re.compile(r"[\x00-\x1f\x7f/\\\ud800-\udfff]")

_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | _CLOSE_ON_EXEC
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOSE_ON_EXEC
# Opening a pipe would wait for somebody to write.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NO_LINKS


def names_in(path: str, *, quoted: bool) -> tuple[str, ...]:
    """The names in ``path``, which may end with ``/``; of a URL it is ``quoted``.

    Raises ``BadRequest`` for what is no path of ours, and ``NotFound`` for hidden names.
    """
    if len(path) > 3 * _MAX_PATH_BYTES:
        raise BadRequest(f"The path is longer than {_MAX_PATH_BYTES} bytes.")
    names = [_unquoted(name) if quoted else name for name in path.removesuffix("/").split("/")]
    if names == [""]:
        return ()
    for name in names:
        if not name or _BAD.search(name) or name[-1] in ". ":
            raise BadRequest(f"The path has the name {name!r}, which is not allowed.")
        if name[0] == ".":
            raise NotFound("There is no such file or directory.")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise BadRequest(f"A name in the path is longer than {_MAX_NAME_BYTES} bytes.")
    if len("/".join(names).encode()) > _MAX_PATH_BYTES:
        raise BadRequest(f"The path is longer than {_MAX_PATH_BYTES} bytes.")
    return tuple(names)


def is_shown(name: str) -> bool:
    """Whether a name in a directory is one that can be asked for."""
    try:
        return names_in(name, quoted=False) == (name,)
    except ServerError:
        return False


def _unquoted(name: str) -> str:
    try:
        return unquote(name, errors="strict")
    except UnicodeDecodeError as error:
        raise BadRequest("The path is not UTF-8.") from error


class OpenFile:
    """A regular file, open for reading, as it was when it was opened."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        about = os.fstat(descriptor)
        self.size = about.st_size
        self.modified = about.st_mtime_ns

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # An answer that nobody waited for any more.
        self.close()

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """At most ``size`` bytes from ``offset`` on; fewer only at the end."""
        parts = []
        while size:
            part = os.pread(self.descriptor, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a directory. ``modified`` is in nanoseconds since 1970."""

    name: str
    is_directory: bool
    size: int
    modified: int


class Root:
    """A directory that holds what can be asked for.

    Methods raise ``NotFound`` and ``Forbidden``.
    """

    def __init__(self, path: str, flag: str) -> None:
        """``flag`` names the setting in a ``StartupError``."""
        if os.open not in os.supports_dir_fd:
            raise StartupError(
                f"{flag} needs Linux or macOS: this system opens files by path only."
            )
        self.flag = flag
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise StartupError(f"{flag}: {path} is no directory; create it, or drop it.")

    def refuse(self, what: str, file: str) -> None:
        """Raise ``StartupError`` when ``file``, which is of the server, lies in it."""
        place = Path(file).resolve()
        if place == self.path or self.path in place.parents:
            raise StartupError(
                f"{self.flag}: {self.path} holds {what} {place}, a file of the server; move one of "
                "them."
            )

    @contextmanager
    def directory(self, names: tuple[str, ...]) -> Iterator[int]:
        """The descriptor of a directory."""
        with explained():
            descriptor = os.open(self.path, _DIRECTORY)
        try:
            for name in names:
                with explained():
                    below = os.open(name, _DIRECTORY | _NO_LINKS, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor
        finally:
            os.close(descriptor)

    def open(self, names: tuple[str, ...]) -> OpenFile:
        """A file."""
        if not names:
            raise NotFound("That is a directory.")
        with self.directory(names[:-1]) as directory:
            return open_in(directory, names[-1])

    def is_directory(self, names: tuple[str, ...]) -> bool:
        try:
            with self.directory(names):
                return True
        except ServerError:
            return False

    def entries(
        self, names: tuple[str, ...], count: int, after: str, shows: Callable[[str, bool], bool]
    ) -> list[Entry]:
        """The first ``count`` entries after the name ``after``, of those that ``shows`` lets pass
        by their name and whether it is a directory. Sorted by name."""
        with self.directory(names) as directory:
            with explained(), os.scandir(directory) as found:
                chosen = heapq.nsmallest(
                    count,
                    (
                        (entry.name, entry.is_dir(follow_symlinks=False))
                        for entry in found
                        if entry.name > after
                        and is_shown(entry.name)
                        and (
                            entry.is_dir(follow_symlinks=False)
                            or entry.is_file(follow_symlinks=False)
                        )
                        and shows(entry.name, entry.is_dir(follow_symlinks=False))
                    ),
                )
            entries = []
            for name, is_directory in chosen:
                # It may be gone by now.
                with contextlib.suppress(OSError):
                    about = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    size = 0 if is_directory else about.st_size
                    entries.append(Entry(name, is_directory, size, about.st_mtime_ns))
            return entries

    def make_directory(self, names: tuple[str, ...]) -> None:
        """Make one in a directory that is there. Raises ``Conflict``."""
        if not names:
            raise Conflict("It is there already.")
        with self.directory(names[:-1]) as directory, explained():
            os.mkdir(names[-1], dir_fd=directory)

    def delete(self, names: tuple[str, ...]) -> None:
        """Delete a file or an empty directory. Raises ``Conflict``."""
        if not names:
            raise Forbidden("The root itself cannot be deleted.")
        with self.directory(names[:-1]) as directory, explained():
            mode = os.stat(names[-1], dir_fd=directory, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                os.rmdir(names[-1], dir_fd=directory)
            elif stat.S_ISREG(mode):
                os.unlink(names[-1], dir_fd=directory)
            else:
                raise NotFound("There is no such file or directory.")


class ServesFiles(Plugin):
    """A plugin that lets clients have what is in ``roots``."""

    roots: Sequence[Root] = ()

    def keep_from(self, settings: Iterable[Settings]) -> None:
        """Raise ``StartupError`` when a root holds a file of a server or app that has
        ``settings``."""
        for one in settings:
            for what, file in private_files(one).items():
                for root in self.roots:
                    root.refuse(what, file)


def open_in(directory: int, name: str) -> OpenFile:
    """The regular file ``name`` of a directory. Raises ``NotFound`` or ``Forbidden``."""
    with explained():
        # Opening a device may do something, so it is looked at before, and after.
        if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise NotFound("There is no such file.")
        descriptor = os.open(name, _READ, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotFound("There is no such file.")
    return OpenFile(descriptor)


@contextmanager
def explained() -> Iterator[None]:
    """Errors of the system as those that clients are told, which name no path of the server."""
    try:
        yield
    except FileExistsError as error:
        raise Conflict("It is there already.") from error
    except PermissionError as error:
        raise Forbidden("The server itself may not do that.") from error
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EBUSY):
            raise Conflict("The directory is not empty, or in use.") from error
        if error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE):
            raise ServerError(f"The file system says: {error.strerror}.") from error
        raise NotFound("There is no such file or directory.") from error
