"""``--resume-window``: results in chunks that go on after a lost connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sqlrooms_server.errors import BadRequest
from sqlrooms_server.features import Feature
from sqlrooms_server.messages import PluginMessage
from sqlrooms_server.peer import Peer
from sqlrooms_server.protocol.fields import whole_number


class Resume(Feature):
    """Answers ``resume``; :class:`features.resuming.Resuming` knows the streams."""

    name = "resume"

    @property
    def handlers(self) -> Mapping[Any, Callable[[Peer, PluginMessage], None]]:
        return {"resume": self._resume}

    def stopping(self) -> None:
        if self.server.resuming is not None:
            self.server.resuming.close()

    def closed(self, peer: Peer) -> None:
        if self.server.resuming is not None:
            self.server.resuming.closed(peer)

    def _resume(self, peer: Peer, message: PluginMessage) -> None:
        fields, query_id = message.fields, message.query_id
        token = fields.get("token")
        try:
            if not isinstance(token, str):
                raise BadRequest("resume needs a field token, that of resumable.")
            seq = whole_number(fields, "seq", 0, 1 << 53)
            if seq is None:
                raise BadRequest("resume needs a field seq, that of the first missing chunk.")
            acked = whole_number(fields, "bytes", 0, 1 << 62)
        except BadRequest as error:
            raise BadRequest(str(error), query_id) from error
        self.server.resuming.resume(peer, query_id, token, seq, acked)
