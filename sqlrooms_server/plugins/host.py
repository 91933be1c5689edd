"""What plugins can ask of the server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from sqlrooms_server.access.roles import Role
from sqlrooms_server.db import values
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.messages import Params
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import encode_value
from sqlrooms_server.settings import Settings


class Host:
    """The server, or one app of it, for its plugins. From any thread but that of the sockets.

    ``channels`` publishes, see :meth:`Channels.publish`; ``connections`` tells who is connected.
    """

    def __init__(
        self,
        settings: Settings,
        runner: Runner,
        channels: Channels,
        connections: Connections,
        roles: Callable[[], Mapping[str, Role]],
    ) -> None:
        self.settings = settings
        self.channels = channels
        self.connections = connections
        self._runner = runner
        self._roles = roles
        self._engine: Engine | None = None
        # For the server's own: the streams that clients may resume, when they may.
        self.resuming: Resuming | None = None

    def start(self, engine: Engine) -> None:
        """For the server: the database is open."""
        self._engine = engine

    @property
    def roles(self) -> Mapping[str, Role]:
        """The roles of the file of tokens, and ``admin``, by their names."""
        return self._roles()

    def role(self, name: str) -> Role:
        """The role ``name``. Raises ``KeyError``, which names those there are."""
        roles = self._roles()
        if name not in roles:
            raise KeyError(f"There is no role {name!r}; known are {', '.join(sorted(roles))}.")
        return roles[name]

    def query(self, sql: str, params: Params | None = None) -> Any:
        """The result of ``sql`` as a ``pyarrow.Table``, asked by the server itself, which may do
        anything. Changes of tables are announced. Raises ``QueryError``."""
        self._runner.must_not_block("server.query")
        with self.engine.cursor() as cursor:
            return values.table_of(cursor.run(sql, params))

    def send(
        self, message: Mapping[str, Any], *, user: str | None = None, connection: str | None = None
    ) -> None:
        """Send a JSON object with a ``type`` to all connections of ``user``, to one, or to all."""
        self._runner.post(self.connections.send, encode_value(message), user, connection)

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine`` on the loop of asyncio, until it ends or the server stops."""
        return self._runner.aio.spawn(coroutine)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("The database is not open yet; wait for started().")
        return self._engine
