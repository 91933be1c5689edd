"""Channels: who hears what is said, and what was said lately. Pure: knows neither clients nor bytes
on a wire, only members that can be told apart.

For one thread.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)

# What a remembered message costs besides its bytes.
_ENTRY_BYTES = 300

MAX_HISTORY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Said:
    """One message of a channel. ``plain`` is what a client gets, ``numbered`` with its offset."""

    number: int
    plain: bytes
    numbered: bytes

    @property
    def size(self) -> int:
        return len(self.plain) + len(self.numbered) + _ENTRY_BYTES


@dataclass(slots=True)
class Hearing:
    """How one member hears a channel: with offsets, and who comes and goes."""

    recover: bool = False
    presence: bool = False


@dataclass(slots=True, eq=False)
class Channel(Generic[M]):
    """One channel. An offset is ``epoch-number``; numbers begin at 1."""

    name: str
    epoch: str = field(default_factory=lambda: secrets.token_hex(5))
    members: dict[M, Hearing] = field(default_factory=dict)
    # Those of the members who hear of others.
    attentive: set[M] = field(default_factory=set)
    number: int = 0
    history: deque[tuple[float, Said]] = field(default_factory=deque)

    @property
    def offset(self) -> str:
        return f"{self.epoch}-{self.number}"


class Hub(Generic[M]):
    """All channels of one server.

    A channel is there while it has members or remembers something. Each remembers its last
    ``history`` messages for ``ttl`` seconds; all together :data:`MAX_HISTORY_BYTES`, those in
    which nobody spoke for the longest time forget first. ``clock`` gives seconds.
    """

    def __init__(self, *, history: int, ttl: float, clock: Callable[[], float]) -> None:
        self._max_history = history
        self._ttl = ttl
        self._clock = clock
        self._channels: dict[str, Channel[M]] = {}
        self._of_member: dict[M, dict[str, Channel[M]]] = {}
        # Those that remember something, by when somebody last spoke.
        self._remembering: dict[Channel[M], None] = {}
        self._history_bytes = 0

    def __len__(self) -> int:
        return len(self._channels)

    def get(self, name: str) -> Channel[M] | None:
        return self._channels.get(name)

    def channels_of(self, member: M) -> list[str]:
        """The names of the channels that ``member`` hears."""
        return list(self._of_member.get(member, ()))

    def join(self, name: str, member: M, hearing: Hearing) -> tuple[Channel[M], bool]:
        """Let ``member`` hear channel ``name``; the channel, and whether it is a new member."""
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(name)
        is_new = member not in channel.members
        channel.members[member] = hearing
        if hearing.presence:
            channel.attentive.add(member)
        else:
            channel.attentive.discard(member)
        self._of_member.setdefault(member, {})[name] = channel
        return channel, is_new

    def leave(self, name: str, member: M) -> Channel[M] | None:
        """Let ``member`` hear ``name`` no more; the channel, or None when it did not hear it."""
        channels = self._of_member.get(member, {})
        channel = channels.pop(name, None)
        if channel is None:
            return None
        if not channels:
            del self._of_member[member]
        del channel.members[member]
        channel.attentive.discard(member)
        self._drop_if_idle(channel)
        return channel

    def say(
        self, name: str, encode: Callable[[str], tuple[bytes, bytes]]
    ) -> tuple[Channel[M], Said]:
        """Count and remember a message. ``encode`` makes both texts of it, given its offset."""
        channel = self._channels.get(name) or Channel(name)
        channel.number += 1
        plain, numbered = encode(channel.offset)
        said = Said(channel.number, plain, numbered)
        if self._max_history:
            self._channels[name] = channel
            self._remember(channel, said)
        return channel, said

    def missed(self, channel: Channel[M], since: str) -> tuple[list[Said], bool]:
        """What was said after the offset ``since``, and whether that is all of it."""
        epoch, _, text = since.partition("-")
        # No number has more digits.
        if epoch != channel.epoch or not (text.isascii() and text.isdigit() and len(text) < 19):
            return [], False
        number = int(text)
        if number > channel.number:
            return [], False
        self._expire(channel)
        later = [said for _, said in channel.history if said.number > number]
        return later, number + len(later) == channel.number

    def forget_old(self) -> float | None:
        """Forget what is too old; seconds until there is more to forget, or None."""
        now = self._clock()
        while self._remembering:
            channel = next(iter(self._remembering))
            # All of it, as soon as the last message is too old: only readers need be exact.
            wait = channel.history[-1][0] + self._ttl - now
            if wait > 0:
                return wait
            self._forget(channel, len(channel.history))
        return None

    def _remember(self, channel: Channel[M], said: Said) -> None:
        now = self._clock()
        channel.history.append((now, said))
        self._history_bytes += said.size
        self._remembering.pop(channel, None)
        self._remembering[channel] = None
        self._forget(channel, len(channel.history) - self._max_history)
        self._expire(channel)
        while self._history_bytes > MAX_HISTORY_BYTES:
            self._forget(next(iter(self._remembering)), 1)

    def _expire(self, channel: Channel[M]) -> None:
        oldest = self._clock() - self._ttl
        while channel.history and channel.history[0][0] <= oldest:
            self._forget(channel, 1)

    def _forget(self, channel: Channel[M], count: int) -> None:
        for _ in range(count):
            self._history_bytes -= channel.history.popleft()[1].size
        if not channel.history:
            self._remembering.pop(channel, None)
            self._drop_if_idle(channel)

    def _drop_if_idle(self, channel: Channel[M]) -> None:
        if not channel.members and not channel.history:
            self._channels.pop(channel.name, None)
