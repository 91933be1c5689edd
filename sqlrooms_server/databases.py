"""The databases of all apps: each file is opened once, for all that name it."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from functools import partial

from sqlrooms_server.app_config import in_app
from sqlrooms_server.database import Database
from sqlrooms_server.db.files import MEMORY
from sqlrooms_server.db.room_files import place, published_rooms
from sqlrooms_server.db.room_store import RoomStore
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings, flag
from sqlrooms_server.together import together

# Two apps that have one database agree on what it is, and on what is kept of it.
SETTINGS_OF_A_DATABASE = (
    *("read_only", "meta_db", "meta_namespace", "extensions", "sandbox", "allow_dir"),
    *("sandbox_functions", "sandbox_temp_size", "max_sql_nesting", "memory_limit", "threads"),
    *("cache_dir", "cache_size", "no_cache", "max_result_rows"),
)

# Where DuckDB spills when it has no file and was told nothing.
_TEMPORARY = ".tmp"


class Databases:
    """What the settings of apps say of their databases. ``apps`` has them by their names, the
    server itself, whose name is empty, first.

    Methods are for the thread that starts and stops.
    """

    def __init__(self, apps: Mapping[str, Settings]) -> None:
        """Opens nothing. Raises ``StartupError`` for two that cannot be."""
        # Of each app, the first one that has its database.
        self._first = _firsts(apps)
        self._apps = _apart(apps, self._first)
        self._open: dict[str, Database] = {}
        # The databases whose published rooms somebody has.
        self._taken: set[Database] = set()
        self._check()

    def open(self, app: str) -> Database:
        """The database of ``app``. Raises ``StartupError``."""
        first = self._first[app]
        if first not in self._open:
            settings = self._apps[first]
            _make_parent(settings.temp_directory)
            others = [other for name, other in self._apps.items() if name != first]
            self._open[first] = Database(settings, others)
        return self._open[first]

    def open_rooms(self, app: str) -> RoomStore:
        """The rooms of ``app``, whose database is open. Raises ``StartupError``."""
        settings, database = self._apps[app], self.open(app)
        store = RoomStore(_rooms(app, settings))
        try:
            # Those that the published server has left are in the database: the first one has them.
            if store.is_new and database not in self._taken:
                store.take_over(published_rooms(database.engine, settings.meta_namespace))
        except BaseException:
            store.close(time.monotonic() + 1.0)
            raise
        self._taken.add(database)
        return store

    def close(self, deadline: float, cache_deadline: float, *, is_quiet: bool) -> bool:
        """Close all, see :meth:`Database.close`."""
        closing = [
            partial(database.close, deadline, cache_deadline, is_quiet=is_quiet)
            for database in self._open.values()
        ]
        return all(together(closing))

    def _check(self) -> None:
        """Each file has one use."""
        uses: dict[object, str] = {}
        for app, settings in self._apps.items():
            first = self._first[app]
            files = {"--rooms-db": _rooms(app, settings) if settings.sync else MEMORY}
            if first == app:
                files.update({"--db-path": settings.db_path, "--meta-db": settings.meta_db})
                files["--temp-directory"] = _spills_to(settings)
            else:
                self._check_equal(app, first)
            with in_app(app):
                for option, path in files.items():
                    if not path or path == MEMORY:
                        continue
                    use = f"{option} of {_called(app)}"
                    other = uses.setdefault(_identity(path), use)
                    if other is not use:
                        raise StartupError(
                            f"{path} is open in this server already, as {other}; choose another "
                            f"file for {option}."
                        )

    def _check_equal(self, app: str, first: str) -> None:
        mine, theirs = self._apps[app], self._apps[first]
        own = ("temp_directory",) if mine.temp_directory else ()
        for name in (*SETTINGS_OF_A_DATABASE, *own):
            if getattr(mine, name) != getattr(theirs, name):
                raise StartupError(
                    f"App {app!r} and {_called(first)} share the database {mine.db_path}, so that "
                    f"they need the same {flag(name)}; it is {getattr(mine, name)!r} and "
                    f"{getattr(theirs, name)!r}."
                )


def _apart(apps: Mapping[str, Settings], first: Mapping[str, str]) -> dict[str, Settings]:
    """``apps``, each database with a directory of its own to spill to.

    Two databases in one take each other's files, and DuckDB 1.5 ends the process then.
    """
    found = dict(apps)
    if len(apps) > 1:
        (_, server), *_ = apps.items()
        for app, settings in apps.items():
            if app and first[app] == app and not settings.temp_directory:
                at = server.temp_directory
                if not settings.sandbox and (at or settings.db_path == MEMORY):
                    at = f"{at}/{app}" if at else f"{_TEMPORARY}-{app}"
                found[app] = dataclasses.replace(settings, temp_directory=at)
    return found


def _spills_to(settings: Settings) -> str:
    """The directory that nobody else may have; a sandbox makes one of its own in it."""
    if settings.sandbox:
        return ""
    return settings.temp_directory or (_TEMPORARY if settings.db_path == MEMORY else "")


def _firsts(apps: Mapping[str, Settings]) -> dict[str, str]:
    first: dict[object, str] = {}
    return {
        app: app
        if settings.db_path == MEMORY
        else first.setdefault(_identity(settings.db_path), app)
        for app, settings in apps.items()
    }


def _make_parent(directory: str) -> None:
    # DuckDB makes the last part of it only.
    parent = os.path.dirname(directory)
    try:
        if parent:
            os.makedirs(parent, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"Cannot make {parent} for --temp-directory: {error.strerror}."
        ) from error


def _rooms(app: str, settings: Settings) -> str:
    return place(settings.db_path, settings.meta_db, settings.rooms_db, app)


def _identity(path: str) -> object:
    """What two names of one file have in common."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except OSError:
        return real
    return status.st_dev, status.st_ino


def _called(app: str) -> str:
    return f"app {app!r}" if app else "the server"
