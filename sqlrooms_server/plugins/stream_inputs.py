"""The inputs of a stream: what clients send, as batches, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlrooms_server.db.ipc import PushedStream
from sqlrooms_server.errors import BadRequest, Busy, Cancelled, ServerError, TooLarge
from sqlrooms_server.messages import StreamData
from sqlrooms_server.plugins.waiting import Waiting

if TYPE_CHECKING:
    import asyncio

# Smaller pieces are joined while they wait: each costs a hundred bytes besides its own.
_JOINED_BYTES = 16 << 10

# Pieces up to it are decoded on the loop of asyncio: a thread takes longer to begin.
_SMALL_BYTES = 64 << 10


class Held:
    """What the inputs of all streams of one connection hold, in bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._size = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> bool:
        """Whether there is room for ``size`` bytes more; then they are counted."""
        with self._lock:
            if size > 0 and self._size + size > self.most:
                return False
            self._size += size
            return True


@dataclass(frozen=True, slots=True)
class InputLimits:
    """``window`` bytes of an input may wait, a batch may have ``max_batch``."""

    window: int
    max_batch: int


class Input:
    """One input. Iterate over its batches with ``async for``, if the handler is a function.

    ``schema`` is a ``pyarrow.Schema``, None before it has come.
    """

    def __init__(self, name: str, limits: InputLimits, inputs: Inputs) -> None:
        self.name = name
        self.has_last = False
        self.waiting: deque[bytearray | memoryview] = deque()
        self.waiting_bytes = 0
        self.arrived_bytes = 0
        self.consumed_bytes = 0
        # As far as the client knows.
        self.told_bytes = 0
        self.next_seq = 0
        # What it holds of the connection's share.
        self.held = 0
        self._inputs = inputs
        self._stream = PushedStream(limits.max_batch, f"input {name!r}")
        self._ready: deque[Any] = deque()
        self._turn: asyncio.Lock | None = None
        self._has_ended = False

    @property
    def schema(self) -> Any:
        return self._stream.schema

    @property
    def keeps(self) -> int:
        """The bytes that it holds: those that wait, and a batch that is not complete."""
        return self.waiting_bytes + self._stream.pending

    def decode(self, piece: bytearray | memoryview, last: bool) -> list[Any]:
        """The batches that ``piece`` completes, each validated. Raises ``BadRequest``."""
        batches: list[Any] = self._stream.feed(memoryview(piece)) if len(piece) else []
        # Without a single byte it is an input that has nothing to say.
        if last and self.arrived_bytes:
            self._stream.finish()
        self._inputs.settle(self)
        return batches

    def __aiter__(self) -> Input:
        return self

    async def __anext__(self) -> Any:
        import asyncio

        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            while not self._ready:
                if self._has_ended:
                    raise StopAsyncIteration
                piece, last = await self._inputs.arrival(self)
                if len(piece) <= _SMALL_BYTES:
                    batches = self.decode(piece, last)
                else:
                    batches = await asyncio.to_thread(self.decode, piece, last)
                self._ready.extend(batches)
                self._has_ended = last
            return self._ready.popleft()


class Inputs(Mapping[str, Input]):
    """All inputs of a stream. ``tell`` is called when an input was consumed, from any thread."""

    def __init__(
        self, names: Sequence[str], limits: InputLimits, held: Held, tell: Callable[[Input], None]
    ) -> None:
        self._inputs = {name: Input(name, limits, self) for name in names}
        self._limits = limits
        self._held = held
        self._tell = tell
        self._waiting = Waiting()
        # Those of which something waits, each once.
        self._order: deque[Input] = deque()
        self._readers = 0
        self._is_closed = False

    def __getitem__(self, name: str) -> Input:
        return self._inputs[name]

    def __iter__(self) -> Any:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    @property
    def are_open(self) -> bool:
        """Whether the client may send more."""
        return not all(source.has_last for source in self.values())

    @property
    def are_empty(self) -> bool:
        return not any(source.waiting_bytes for source in self.values())

    @property
    def are_awaited(self) -> bool:
        """Whether a coroutine waits for something to come."""
        return bool(self._readers)

    def add(self, data: StreamData) -> ServerError | None:
        """``data`` arrived; why it may not. For the loop thread."""
        source = self._inputs.get(data.input)
        if source is None:
            known = ", ".join(map(repr, self._inputs)) or "none"
            return BadRequest(f"There is no input {data.input!r}; the stream has {known}.")
        error = self._refusal(source, data)
        if error is not None:
            return error
        with self._waiting:
            source.next_seq += 1
            source.has_last = data.last
            size = len(data.body)
            source.arrived_bytes += size
            source.waiting_bytes += size
            source.held += size
            if size or data.last:
                _append(source.waiting, data.body)
                if source not in self._order:
                    self._order.append(source)
        self._waiting.changed()
        return None

    def _refusal(self, source: Input, data: StreamData) -> ServerError | None:
        size, window = len(data.body), self._limits.window
        if source.has_last:
            return BadRequest(f"Data of input {source.name!r} came after the last.")
        if data.seq != source.next_seq:
            return BadRequest(
                f"Input {source.name!r}: seq {source.next_seq} was expected, not {data.seq}."
            )
        if source.waiting_bytes and source.waiting_bytes + size > window:
            return TooLarge(
                f"Over {window} bytes of input {source.name!r} wait (--stream-window); wait for "
                "streamAck before sending more."
            )
        if not self._held.add(size):
            return Busy(
                f"The streams of this connection hold {self._held.most} bytes that wait or are "
                "parts of batches, twice --max-message-size; use fewer, or send smaller batches."
            )
        return None

    def take(self) -> tuple[Input, bytearray | memoryview, bool] | None:
        """A piece of the input whose turn it is, and whether it is its last; None if none waits.

        For the thread that handles the stream.
        """
        with self._waiting:
            if not self._order:
                return None
            source = self._order.popleft()
            piece, last = self._piece(source)
            if source.waiting:
                self._order.append(source)
        self._consumed(source)
        return source, piece, last

    async def arrival(self, source: Input) -> tuple[bytearray | memoryview, bool]:
        """The next piece of ``source``, and whether it is the last. Raises ``Cancelled``."""
        self._readers += 1
        try:
            await self._waiting.until_async(lambda: bool(source.waiting) or self._is_closed)
        finally:
            self._readers -= 1
        with self._waiting:
            if not source.waiting:
                raise Cancelled("The stream has ended.")
            taken = self._piece(source)
        self._consumed(source)
        return taken

    def _piece(self, source: Input) -> tuple[bytearray | memoryview, bool]:
        piece = source.waiting.popleft()
        source.waiting_bytes -= len(piece)
        source.consumed_bytes += len(piece)
        return piece, source.has_last and not source.waiting

    def _consumed(self, source: Input) -> None:
        # Seldom enough for small pieces, and never so late that a client waits for it.
        untold = source.consumed_bytes - source.told_bytes
        if untold and (not source.waiting_bytes or untold >= self._limits.window // 4):
            self._tell(source)

    def settle(self, source: Input) -> None:
        """Give back what ``source`` does not hold any more."""
        with self._waiting:
            change = 0 if self._is_closed else source.keeps - source.held
            source.held += change
        self._held.add(change)

    def close(self) -> None:
        """Nobody handles the stream any more."""
        with self._waiting:
            if self._is_closed:
                return
            self._is_closed = True
            held = sum(source.held for source in self.values())
            for source in self.values():
                source.waiting.clear()
            self._order.clear()
        self._held.add(-held)
        self._waiting.changed()


def _append(waiting: deque[bytearray | memoryview], body: memoryview) -> None:
    if len(body) >= _JOINED_BYTES:
        waiting.append(body)
    elif waiting and isinstance(waiting[-1], bytearray) and len(waiting[-1]) < _JOINED_BYTES:
        waiting[-1] += body
    else:
        waiting.append(bytearray(body))
