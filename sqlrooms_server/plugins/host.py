"""What plugins can ask of the server."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from sqlrooms_server.access.roles import Role
from sqlrooms_server.db import values
from sqlrooms_server.db.engine import Engine
from sqlrooms_server.features.channels import Channels
from sqlrooms_server.features.connections import Connections
from sqlrooms_server.features.resuming import Resuming
from sqlrooms_server.messages import Message, Params
from sqlrooms_server.peer import Peer
from sqlrooms_server.plugins.objects import Objects
from sqlrooms_server.plugins.runner import Runner
from sqlrooms_server.protocol import encode_value
from sqlrooms_server.settings import Settings
from sqlrooms_server.timers import Timers


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
        objects: Objects,
        roles: Callable[[], Mapping[str, Role]],
        needs_token: Callable[[], bool],
        app: str = "",
        path: str = "",
    ) -> None:
        self.settings = settings
        # The name of the app, and what its paths begin with; both empty for the server itself.
        self.app = app
        self.path = path
        self.channels = channels
        self.connections = connections
        self.objects = objects
        self._runner = runner
        self._roles = roles
        self._needs_token = needs_token
        self._engine: Engine | None = None
        # For the server's own: the streams that clients may resume, when they may.
        self.resuming: Resuming | None = None
        # For plugins on the loop: what does a message of somebody, and forgets about somebody.
        self.perform: Callable[[Peer, Message], None] = _nobody_there
        self.leave: Callable[[Peer], None] = _nobody_there

    def start(self, engine: Engine) -> None:
        """For the server: the database is open."""
        self._engine = engine

    @property
    def roles(self) -> Mapping[str, Role]:
        """The roles of the file of tokens, and ``admin``, by their names."""
        return self._roles()

    @property
    def needs_token(self) -> bool:
        """Whether everybody must be known to somebody."""
        return self._needs_token()

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

    def publish(
        self,
        name: str,
        obj: Any,
        *,
        users: Iterable[str] | None = None,
        roles: Iterable[str] | None = None,
    ) -> None:
        """Let clients use ``obj`` under ``name``, see :meth:`Objects.publish`."""
        self.objects.publish(name, obj, users=users, roles=roles)

    def unpublish(self, name: str) -> bool:
        """Take back what was published as ``name``; False when nothing was."""
        return self.objects.unpublish(name)

    def relation(self, sql: str, params: Params | None = None) -> values.Relation:
        """What ``sql`` returns, to be published, see :meth:`Objects.relation`."""
        return self.objects.relation(sql, params)

    def create_task(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine`` on the loop of asyncio, until it ends or the server stops."""
        return self._runner.aio.spawn(coroutine)

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call ``function`` on the loop, soon."""
        self._runner.post(function, *arguments)

    @property
    def timers(self) -> Timers:
        return self._runner.timers

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("The database is not open yet; wait for started().")
        return self._engine


def _nobody_there(*_: Any) -> None:
    raise RuntimeError("The database is not open yet; wait for started().")
