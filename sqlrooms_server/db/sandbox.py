"""The sandbox of a server: what bounds everybody, and what DuckDB itself is told never to do.

The policy is what holds. The locks are for what it might have missed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import duckdb

from sqlrooms_server.cache.directory import Place
from sqlrooms_server.db import files
from sqlrooms_server.db.paths import Directories
from sqlrooms_server.db.policy import UNRESTRICTED, Policy
from sqlrooms_server.db.statements import quote_literal
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings, flag

# Settings of a cursor that the server changes when a client asks for progress.
_OWN_SETTINGS = ("enable_progress_bar", "enable_progress_bar_print")

# Settings that name files which are nobody's business.
_PRIVATE = (
    "rooms_db",
    "meta_db",
    "temp_directory",
    "auth_token_file",
    "tokens",
    "tls_cert",
    "tls_key",
)


def private_files(settings: Settings) -> dict[str, str]:
    """Paths that are nobody's business, by what they are."""
    paths = {
        "the database": settings.db_path,
        "the cache": "" if settings.no_cache else str(Place(settings.cache_dir, "").parent),
        **{f"the file of {flag(name)}": getattr(settings, name) for name in _PRIVATE},
    }
    return {name: path for name, path in paths.items() if path and path != files.MEMORY}


def base_policy(settings: Settings) -> Policy:
    """What bounds everybody, whatever their role."""
    if not settings.sandbox:
        return UNRESTRICTED
    return Policy(
        read_only=settings.sandbox == "select",
        files=False,
        extensions=False,
        source=f"--sandbox {settings.sandbox}",
    )


@dataclass(frozen=True, slots=True)
class Sandbox:
    """``policy`` bounds everybody; unless it is open, DuckDB is locked. ``functions`` of extensions
    may be called by the restricted.
    """

    policy: Policy = UNRESTRICTED
    directories: Directories = field(default_factory=Directories)
    functions: tuple[str, ...] = ()
    temp_directory: str = ""
    temp_size: int = 0

    @classmethod
    def of(cls, settings: Settings, others: Sequence[Settings] = ()) -> Sandbox:
        """``others`` are those of other databases of this process.

        Raises ``StartupError`` for a directory that is not there or holds too much.
        """
        directories = Directories(settings.allow_dir)
        for one in (settings, *others):
            for name, path in private_files(one).items():
                directories.refuse(name, path)
        return cls(
            base_policy(settings),
            directories,
            settings.sandbox_functions,
            settings.temp_directory,
            settings.sandbox_temp_size,
        )

    @property
    def config(self) -> dict[str, str]:
        """What DuckDB must be told when it opens the database."""
        if self.policy.is_open:
            return {}
        return {"allow_persistent_secrets": "false", "autoload_known_extensions": "false"}

    @contextlib.contextmanager
    def locked(self, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
        """While the database serves clients. After everything that is loaded and attached."""
        if self.policy.is_open:
            yield
            return
        with contextlib.ExitStack() as stack:
            if self.temp_directory:
                _make(self.temp_directory)
            place = tempfile.mkdtemp(prefix="sqlrooms-temp-", dir=self.temp_directory or None)
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            allowed = ", ".join(quote_literal(directory) for directory in self.directories)
            try:
                for setting in (
                    "allow_community_extensions = false",
                    f"temp_directory = {quote_literal(place)}",
                    f"max_temp_directory_size = '{self.temp_size}B'",
                    f"allowed_directories = [{allowed}]",
                    "enable_external_access = false",
                ):
                    connection.execute(f"SET GLOBAL {setting}")
                with contextlib.suppress(duckdb.CatalogException):
                    # Old versions of DuckDB have none; then progress tells no percentage.
                    names = ", ".join(quote_literal(name) for name in _OWN_SETTINGS)
                    connection.execute(f"SET GLOBAL allowed_configs = [{names}]")
                connection.execute("SET GLOBAL lock_configuration = true")
            except duckdb.Error as error:
                raise StartupError(
                    f"--sandbox: DuckDB cannot be locked: {str(error).splitlines()[0]}"
                ) from error
            yield


def _make(directory: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"Cannot make the directory {directory} of --temp-directory: {error.strerror}."
        ) from error
