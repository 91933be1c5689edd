"""Which objects are published, as a flow."""

from __future__ import annotations

from sqlrooms_server.client.exchanges import Exchange
from sqlrooms_server.client.feeds import Feed
from sqlrooms_server.client.link import Link
from sqlrooms_server.client.messages import encode
from sqlrooms_server.client.plugin_replies import (
    ObjectChanges,
    ObjectList,
)
from sqlrooms_server.client.replies import (
    Reply,
)


class ObjectWatch(Feed[ObjectList]):
    """What is published, and again whenever that has changed."""

    what = "watch of objects"
    _present = ObjectList()

    def _open(self, link: Link) -> Exchange:
        self._query_id = self._new_id()
        return link.open(("query", self._query_id), is_feed=True)

    def _send(self, link: Link) -> None:
        link.send(encode(type="object-list", queryId=self._query_id, watch=True))

    def _take(self, reply: Reply) -> ObjectList | None:
        if isinstance(reply, ObjectChanges):
            reply = reply.after(self._present)
        assert isinstance(reply, ObjectList)
        self._present = reply
        return reply
