"""What an app is told: its path, and in which settings it differs from the server."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings

PluginOptions = Mapping[str, Mapping[str, Any]]
"""What plugins are told, by their names."""

# The transport, the threads of queries and the process are one for all apps.
OF_THE_SERVER = frozenset(
    "host port unix_socket unix_socket_mode tls_cert tls_key trusted_proxy proxy_headers "
    "max_connections max_connections_per_address max_http_connections max_message_size "
    "max_queued_bytes max_queue workers process_memory idle_timeout log_level".split()
)

# Data, code, and what opens them: an app that says nothing has the default, not that of the server.
OWN = frozenset(
    "db_path meta_db rooms_db temp_directory allow_dir plugin queries files static".split()
)

# Those that say who may come: an app that has one of them has none of the server's, so that a token
# of the server is none of that app.
CREDENTIALS = frozenset("auth_token auth_token_file tokens insecure_no_auth".split())

# An app that says nothing has these from the server.
INHERITED = frozenset(
    "read_only meta_namespace extensions sandbox sandbox_functions sandbox_temp_size auth_cookie "
    "auth_timeout max_auth_failures max_strangers allow_origin allow_host max_sql_length "
    "max_sql_nesting max_in_flight query_timeout max_result_rows stream_idle_timeout "
    "session_idle_timeout max_sessions_per_connection max_sessions max_channels_per_connection "
    "max_channels max_notify_size notify_rate channel_history channel_history_ttl "
    "max_live_per_connection max_live sync max_rooms max_rooms_per_connection max_room_size "
    "max_update_size update_rate room_history room_idle_timeout room_memory cache_dir cache_size "
    "no_cache plugin_timeout plugin_workers plugin_backlog max_http_result max_file_size "
    "max_object_streams max_object_references stream_window max_streams_per_connection "
    "resume_window resume_timeout resume_memory max_waiting_streams max_waiting_streams_per_user "
    "memory_limit threads".split()
)

# They become part of the names of files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# Nothing that could be written in two ways, and no segment that begins with a point.
_PATH = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+")


@dataclass(frozen=True)
class AppConfig:
    """An app of a server: everything that a server is, behind a path of its own.

    ``settings`` are those in which it differs from the server, see :data:`OWN`. ``path`` is
    ``/name`` unless given. ``plugins`` come after those that its settings name, ``options`` are
    those of its plugins. Raises ``StartupError``.
    """

    name: str
    # They may hold a token.
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str = ""
    plugins: Sequence[Any] = ()
    options: PluginOptions = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise StartupError(
                f"An app cannot be called {self.name!r}: a name has up to 64 letters, digits, "
                "- and _, and begins with a letter or a digit."
            )
        if not self.path:
            object.__setattr__(self, "path", f"/{self.name}")
        if not _PATH.fullmatch(self.path):
            raise StartupError(
                f"App {self.name!r}: path must be such as /sales or /team/sales, of letters, "
                f"digits, -, _, ~ and points, without a slash at its end, not {self.path!r}."
            )

    def settings_within(self, server: Settings) -> Settings:
        """All settings of the app, of a server that has ``server``. Raises ``StartupError``."""
        known = [row.name for row in fields(Settings)]
        with in_app(self.name):
            for name in self.settings:
                if name in OF_THE_SERVER or name == "config":
                    raise StartupError(
                        f"{name} is a setting of the whole server, which an app cannot have."
                    )
                if name not in known:
                    raise StartupError(f"{name} is not a setting.")
            omitted = OWN
            if any(self.settings.get(name) for name in CREDENTIALS):
                omitted = OWN | CREDENTIALS
            values = {name: getattr(server, name) for name in known if name not in omitted}
            return Settings(**{**values, **self.settings})


@contextlib.contextmanager
def in_app(name: str) -> Iterator[None]:
    """Name the app in the ``StartupError`` of what is done for it; that of the server has none."""
    try:
        yield
    except StartupError as error:
        if not name or str(error).startswith(f"App {name!r}: "):
            raise
        raise StartupError(f"App {name!r}: {error}") from error
