"""One document of Loro. The only importer of loro; runs in a process of its own.

Loro reports every error as a bare ``BaseException``. A panic, which is a subclass, leaves a
document that cannot be used any more; so does an update that failed half-way. Both are ``Broken``.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loro import EphemeralStore, ExportMode, Frontiers, LoroDoc, VersionVector

T = TypeVar("T")

# The number of no sender.
NOBODY = -1

EMPTY_SNAPSHOT = bytes(LoroDoc().export(ExportMode.Snapshot()))

# As the clients of Loro have it.
PRESENCE_SECONDS = 30

MAX_PRESENCE_BYTES = 1 << 20

# Where an export says what it is, and what stands there for updates.
_MODE = slice(20, 22)
_UPDATES = b"\x00\x04"

# What is larger is not read a second time to see that it can be.
_CHECKED_BYTES = 1 << 20

# A snapshot up to this is made anew for everybody who joins; a larger one is sent again with the
# updates since then, until these are so many.
_SMALL_BYTES = 64 << 10
_MAX_SINCE = 4

# A text of this length takes a millisecond to go from the log into the state, and ten times the
# length a hundred times as long. On its own Loro can do better, if nothing was concurrent.
_LONG_BYTES = 16 << 10

# What Loro says when history was cut.
_OUTDATED = "shallow history"


class Refused(Exception):
    """An update that cannot be taken.

    ``code`` is "bad_request", "gone" when it needs history that is gone, or "too_large".
    """

    def __init__(self, text: str, code: str = "bad_request") -> None:
        super().__init__(text)
        self.code = code


class Broken(Exception):
    """The document cannot be used any more and has to be loaded again."""


@dataclass
class Applied:
    """What came of some updates.

    ``statuses`` are one for each: "applied", "pending", or an error with its code. ``delta`` is
    what is new in the document, empty for nothing, and ``parts`` the same by the sender it came
    from. ``pending`` are the updates that wait. ``is_whole``: the delta is a snapshot, of a
    document whose history was cut.
    """

    statuses: list[str | tuple[str, str]] = field(default_factory=list)
    delta: bytes = b""
    parts: list[tuple[int, bytes]] = field(default_factory=list)
    pending: list[bytes] = field(default_factory=list)
    is_whole: bool = False


@dataclass
class Document:
    """One room. ``is_plain``: Loro has failed to make a snapshot of it; none is asked for."""

    is_plain: bool = False

    def __post_init__(self) -> None:
        self._doc = LoroDoc()
        # Updates go into the log of the document first, and into its state all at once, which is
        # several times as fast.
        self._is_behind = False
        self._presence: EphemeralStore | None = None
        # Whether updates may wait for others.
        self._has_pending = False

    @property
    def version(self) -> bytes:
        return bytes(self._doc.oplog_vv.encode())

    @property
    def frontiers(self) -> bytes:
        return bytes(self._doc.oplog_frontiers.encode())

    def load(self, snapshot: bytes, updates: Sequence[bytes]) -> dict[int, str]:
        """Read what was stored; why some of ``updates`` cannot be read, by their numbers.

        Raises ``Refused`` for the snapshot.
        """
        if snapshot:
            _guarded(lambda: self._doc.import_(bytes(snapshot)))
            # It is read lazily; better to know now.
            if self._doc.oplog_vv == VersionVector() and bytes(snapshot) != EMPTY_SNAPSHOT:
                raise Refused("it holds nothing, or something else than a whole document")
        unreadable: dict[int, str] = {}
        for number, update in enumerate(updates):
            try:
                status = self._import(bytes(update))
                self._has_pending = self._has_pending or status.pending is not None
            except Refused as error:
                unreadable[number] = str(error)
        self._follow_log()
        return unreadable

    def apply(self, updates: Sequence[tuple[int, bytes]], space: int) -> Applied:
        """Import updates and snapshots, each with the number of its sender.

        What is new in the snapshots may have ``space`` bytes.
        """
        before = self._doc.oplog_vv
        applied = Applied()
        for sender, run in itertools.groupby(updates, key=operator.itemgetter(0)):
            since = self._doc.oplog_vv
            known = self._doc.oplog_vv
            for _, update in run:
                status, used = self._take(update, applied, known, space)
                applied.statuses.append(status)
                space -= used
            if self._doc.oplog_vv != since and not applied.is_whole:
                # With what waited for it, the sender needs it, too.
                is_own = not self._has_pending or known.includes_vv(self._doc.oplog_vv)
                applied.parts.append((sender if is_own else NOBODY, self._since(since)))
        self._follow_log()
        if self._doc.oplog_vv == before:
            return applied
        if applied.is_whole:
            applied.delta = self.snapshot()[0]
            senders = {sender for sender, _ in updates}
            applied.parts = [(senders.pop() if len(senders) == 1 else NOBODY, applied.delta)]
            return applied
        applied.delta = applied.parts[0][1] if len(applied.parts) == 1 else self._since(before)
        if len(applied.delta) <= _CHECKED_BYTES:
            # What Loro cannot read again must not be stored.
            try:
                _guarded(lambda: LoroDoc().import_(applied.delta))
            except Refused as error:
                raise Broken(str(error)) from error
        return applied

    def _take(
        self, update: bytes, applied: Applied, known: VersionVector, space: int
    ) -> tuple[str | tuple[str, str], int]:
        """Import into the log; the status, and how much of ``space`` that takes.

        ``known``, what the sender has, grows with it.
        """
        used = 0
        try:
            if update[_MODE] != _UPDATES:
                update, is_whole = self._rest_of_snapshot(update, space)
                used = len(update)
                applied.is_whole = applied.is_whole or is_whole
            status = self._import(update)
            if status.pending is not None and not self._has_pending:
                self._has_pending = True
                known.merge(self._doc.oplog_vv)
            if self._has_pending:
                meta = _guarded(lambda: LoroDoc.decode_import_blob_meta(update, False))
                if known.includes_vv(meta.partial_start_vv):
                    known.merge(meta.partial_end_vv)
        except Refused as error:
            return (str(error), error.code), used
        if status.pending is None:
            return "applied", used
        applied.pending.append(update)
        return "pending", used

    def missing(self, version: bytes) -> tuple[bytes, str]:
        """What a document at ``version`` lacks, and "update", "snapshot" or "reset".

        Raises ``Refused`` for what is no version.
        """
        if not version:
            return self.snapshot()[0], "snapshot"
        vector = _version(version)
        if vector == VersionVector():
            return self.snapshot()[0], "snapshot"
        if not vector.includes_vv(self._doc.shallow_since_vv):
            return self.snapshot()[0], "reset"
        return self._since(vector), "update"

    def whole(self, base_version: bytes | None, base_size: int) -> tuple[bytes | None, bytes]:
        """A snapshot and the update that completes it.

        The snapshot is None when the one that the caller has will do, which is at ``base_version``.
        """
        if base_version is not None and base_size > _SMALL_BYTES:
            base = _version(base_version)
            if base.includes_vv(self._doc.shallow_since_vv):
                if base == self._doc.oplog_vv:
                    return None, b""
                since = self._since(base)
                if len(since) < base_size // _MAX_SINCE:
                    return None, since
        return self.snapshot()[0], b""

    def snapshot(self, cut: bytes = b"") -> tuple[bytes, bytes]:
        """The whole document, without the history before ``cut``; and the updates that wait.

        Raises ``Broken`` when no snapshot can be made of it.
        """
        doc = self._doc
        # Not what Loro makes of it: that grows when an empty document is read, and the published
        # connector knows an empty room by its size.
        if doc.oplog_vv == VersionVector():
            return EMPTY_SNAPSHOT, _guarded(doc.export_pending_updates) or b""
        mode = ExportMode.Updates(VersionVector()) if self.is_plain else ExportMode.Snapshot()
        if cut and not self.is_plain:
            mode = ExportMode.ShallowSnapshot(Frontiers.decode(cut))
        try:
            exported = _guarded(lambda: doc.export(mode))
            if not self.is_plain:
                # Of a document with a crafted update Loro makes snapshots that it cannot read.
                other = LoroDoc()
                _guarded(lambda: other.import_(exported))
                _guarded(other.get_deep_value)
            return exported, _guarded(doc.export_pending_updates) or b""
        except Refused as error:
            raise Broken(str(error)) from error

    def json(self) -> str:
        """What the document holds, as JSON. Raises ``Refused``."""
        try:
            value = _plain(_guarded(self._doc.get_deep_value))
            # A damaged document may name parts that it does not have.
            return json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError as error:
            raise Refused("The document is nested too deeply to be read as JSON.") from error

    def tell_presence(self, data: bytes) -> None:
        """Note who is where. Raises ``Refused``."""
        if self._presence is None:
            self._presence = EphemeralStore(PRESENCE_SECONDS * 1000)
        store = self._presence
        _guarded(store.remove_outdated)
        size = len(_guarded(store.encode_all))
        if size + len(data) > MAX_PRESENCE_BYTES:
            raise Refused(f"The presence of a room has at most {MAX_PRESENCE_BYTES} bytes.")
        _guarded(lambda: store.apply(data))

    def presence(self) -> bytes:
        """Who is where; empty when nobody said."""
        if self._presence is None:
            return b""
        _guarded(self._presence.remove_outdated)
        if not self._presence.keys():
            return b""
        return bytes(_guarded(self._presence.encode_all))

    def _import(self, update: bytes) -> Any:
        """Import; an update that is refused has changed nothing. To be followed by
        :meth:`_follow_log` before anything else is asked.
        """
        if len(update) > _LONG_BYTES or update[_MODE] != _UPDATES:
            self._follow_log()
        elif not self._is_behind:
            self._doc.detach()
            self._is_behind = True
        before = self._doc.oplog_vv
        try:
            return _guarded(lambda: self._doc.import_(update))
        except Refused as error:
            has_changed = not self._is_behind and self._doc.state_vv != before
            if self._doc.oplog_vv != before or has_changed:
                raise Broken(str(error)) from error
            raise

    def _follow_log(self) -> None:
        """Bring the state to where the log is. What cannot be done breaks the document."""
        if not self._is_behind:
            return
        try:
            _guarded(self._doc.checkout_to_latest)
        except Refused as error:
            raise Broken(str(error)) from error
        if self._doc.state_vv != self._doc.oplog_vv:
            raise Broken("its changes cannot be followed")
        self._is_behind = False

    def _rest_of_snapshot(self, snapshot: bytes, space: int) -> tuple[bytes, bool]:
        """What is new in ``snapshot``, as an update, and whether that is all of it.

        By way of another document: Loro reads the parts of a snapshot when they are needed, and
        what cannot be read then would break the room. Raises ``Refused`` also when it is more than
        ``space`` bytes.
        """
        other = LoroDoc()
        _guarded(lambda: other.import_(snapshot))
        _guarded(other.get_deep_value)
        mine = self._doc.oplog_vv
        is_whole = other.is_shallow() and not mine.includes_vv(other.shallow_since_vv)
        if is_whole and mine != VersionVector():
            raise Refused("The history of the snapshot begins after what the room has.", "gone")
        mode = ExportMode.Snapshot() if is_whole else ExportMode.Updates(mine)
        update = bytes(_guarded(lambda: other.export(mode)))
        if len(update) > space and not mine.includes_vv(other.oplog_vv):
            raise Refused("There is no space for what is new in it.", "too_large")
        return update, is_whole

    def _since(self, vector: VersionVector) -> bytes:
        try:
            return bytes(_guarded(lambda: self._doc.export(ExportMode.Updates(vector))))
        except Refused as error:
            raise Broken(str(error)) from error


def decoded(text: bytes) -> bytes:
    """The bytes of a base64 text. Raises ``Refused``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"data is not base64: {error}.") from error


def _version(encoded: bytes) -> VersionVector:
    try:
        return _guarded(lambda: VersionVector.decode(encoded))
    except Refused as error:
        raise Refused("version is not an encoded version vector of Loro.") from error


def _guarded(call: Callable[[], T]) -> T:
    """What ``call`` returns; errors of Loro as ``Refused``, panics as ``Broken``."""
    try:
        return call()
    except (TypeError, AttributeError, RecursionError):
        raise
    except BaseException as error:  # guard: Loro raises the base class itself
        text = str(error)
        if type(error) is BaseException:
            raise Refused(text, "gone" if _OUTDATED in text else "bad_request") from error
        raise Broken(f"{type(error).__name__}: {text}") from error


def _plain(value: Any) -> Any:
    """``value`` of a document as JSON has it: bytes as base64, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value
