"""Watches and live queries for programs that wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from sqlrooms_server.client import feeds
from sqlrooms_server.client.messages import Change

if TYPE_CHECKING:
    from sqlrooms_server.client.sync import Client, Result


class Watch:
    """Changes of tables, told after every commit by anybody on the server.

    Iterate over it, for one thread at a time; another one may close it, which ends the iteration.
    Changes that nobody reads are told together later. After a lost connection it goes on by itself
    with what was missed, or with one ``Change`` with ``resync``; ``ConnectionLost`` is raised when
    there is no server for about ten seconds, and ``RequestFailed`` for what the server refuses.
    """

    def __init__(self, client: Client, feed: feeds.Watch) -> None:
        self._client = client
        self._feed = feed
        client._run(feed.begin())

    @property
    def versions(self) -> Mapping[str, int]:
        """When each table changed last, as far as it was read here: larger is later, 0 never."""
        return self._feed.versions

    @property
    def version(self) -> str | None:
        """The version of the last change that was read, for ``since`` of a later watch."""
        return self._feed.version

    def next(self, timeout: float | None = None) -> Change:
        """The next change. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when the watch is closed."""
        change = self._client._run(self._feed.next(timeout))
        if change is None:
            raise RuntimeError("The watch is closed.")
        return change

    def close(self) -> None:
        """End the watch."""
        self._feed.close()

    def __iter__(self) -> Iterator[Change]:
        return self

    def __next__(self) -> Change:
        change = self._client._run(self._feed.next(None))
        if change is None:
            raise StopIteration
        return change

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._feed.abandon()


class Live:
    """The results of a live query: the present one, and another whenever it has changed.

    Iterate over it, for one thread at a time; another one may close it, which ends the iteration.
    Who is slow gets the latest result and misses those before it. After a lost connection the query
    is sent again, and its result is told when it is another one than the last;
    ``ConnectionLost`` is raised when there is no server for about ten seconds, and
    ``RequestFailed`` when the server ends the query.
    """

    def __init__(self, client: Client, feed: feeds.Live) -> None:
        self._client = client
        self._feed = feed
        client._run(feed.begin())

    def next(self, timeout: float | None = None) -> Result:
        """The next result. Raises ``TimeoutError`` when none comes within ``timeout`` seconds, and
        ``RuntimeError`` when the live query is closed."""
        snapshot = self._client._run(self._feed.next(timeout))
        if snapshot is None:
            raise RuntimeError("The live query is closed.")
        return self._client._result(snapshot)

    def close(self) -> None:
        """End the live query."""
        self._feed.close()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        snapshot = self._client._run(self._feed.next(None))
        if snapshot is None:
            raise StopIteration
        return self._client._result(snapshot)

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._feed.abandon()
