"""Handing messages to the features that answer them."""

from __future__ import annotations

from collections.abc import Iterable

from sqlrooms_server.errors import ServerError
from sqlrooms_server.features import Feature, MessageHandler
from sqlrooms_server.features.interception import Interception
from sqlrooms_server.features.requests import as_server_error
from sqlrooms_server.features.uploads import Uploads
from sqlrooms_server.messages import Message, UploadChunk
from sqlrooms_server.peer import Peer


class Dispatch:
    """Knows which feature answers what. For the loop thread, once it is open."""

    def __init__(self) -> None:
        self.handlers: dict[type, MessageHandler] = {}

    def open(
        self, features: Iterable[Feature], uploads: Uploads, interception: Interception
    ) -> None:
        """The database is open. From the thread that starts."""
        for feature in features:
            self.handlers.update(feature.handlers)
        self._uploads = uploads
        self._interception = interception

    def carry_out(self, peer: Peer, message: Message) -> None:
        """Handle ``message``, which ``peer`` may send."""
        try:
            self.handlers[type(message)](peer, message)
        except ServerError as error:
            peer.send_error(error)
        except Exception as error:  # top guard of a message: its sender waits for an answer
            told = as_server_error(error)
            told.query_id = getattr(message, "query_id", None)
            peer.send_error(told)

    def perform(self, peer: Peer, message: Message) -> None:
        """As :meth:`carry_out`, for a caller who wants to know what was wrong."""
        self.handlers[type(message)](peer, message)

    def refuse(self, peer: Peer, message: Message, error: ServerError, goes_on: bool) -> None:
        """Answer ``message`` with ``error``, before anything of it began. When it ``goes_on``,
        more of it will come, which is ignored."""
        told = type(error)(str(error), getattr(message, "query_id", None))
        told.channel = getattr(message, "channel", None)
        told.room = getattr(message, "room", None)
        if goes_on and isinstance(message, UploadChunk):
            self._uploads.refused(peer, message)
        self.refuse_with(peer, message, told)

    def refuse_with(self, peer: Peer, message: Message, error: ServerError) -> None:
        """Answer ``message`` with ``error``, which names what it is about."""
        peer.send_error(error)
        self._interception.refused(peer, message, error)
