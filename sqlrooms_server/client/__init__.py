"""The Python client, for notebooks and programs. Needs the extra ``client``.

with connect("ws://localhost:4000") as db:
    table = db.query("select 42 as answer").to_arrow()
"""

from sqlrooms_server.client.aio import AsyncClient, connect_async
from sqlrooms_server.client.aio_feeds import (
    AsyncLive,
    AsyncObjectWatch,
    AsyncSubscription,
    AsyncWatch,
)
from sqlrooms_server.client.aio_objects import AsyncOpenObject
from sqlrooms_server.client.aio_results import AsyncResult, AsyncSession
from sqlrooms_server.client.aio_streams import AsyncBatchStream, AsyncOutput
from sqlrooms_server.client.errors import ConnectionLost, QueryTimeout, RequestFailed, SessionEnded
from sqlrooms_server.client.objects import Fetched, ObjectMessage, Reference
from sqlrooms_server.client.plugin_replies import (
    ObjectInfo,
)
from sqlrooms_server.client.replies import (
    CacheStats,
    Change,
    Heard,
    Joined,
    Left,
    Member,
    MemberList,
    Message,
    Missed,
    Progress,
    Summary,
)
from sqlrooms_server.client.results import RowList
from sqlrooms_server.client.sync import Client, connect
from sqlrooms_server.client.sync_feeds import Live, ObjectWatch, Subscription, Watch
from sqlrooms_server.client.sync_objects import OpenObject
from sqlrooms_server.client.sync_results import Result, Session
from sqlrooms_server.client.sync_streams import BatchStream, Output

__all__ = [
    "AsyncBatchStream",
    "AsyncClient",
    "AsyncLive",
    "AsyncObjectWatch",
    "AsyncOpenObject",
    "AsyncOutput",
    "AsyncResult",
    "AsyncSession",
    "AsyncSubscription",
    "AsyncWatch",
    "BatchStream",
    "CacheStats",
    "Change",
    "Client",
    "ConnectionLost",
    "Fetched",
    "Heard",
    "Joined",
    "Left",
    "Live",
    "Member",
    "MemberList",
    "Message",
    "Missed",
    "ObjectInfo",
    "ObjectMessage",
    "ObjectWatch",
    "OpenObject",
    "Output",
    "Progress",
    "QueryTimeout",
    "Reference",
    "RequestFailed",
    "Result",
    "RowList",
    "Session",
    "SessionEnded",
    "Subscription",
    "Summary",
    "Watch",
    "connect",
    "connect_async",
]
