"""What statements that run on one cursor commit, and when."""

from __future__ import annotations

from sqlrooms_server.db.changes import Expected, joined
from sqlrooms_server.db.statements import Statements


class Transaction:
    """The transaction of a cursor that runs one text after the other, as far as it is known."""

    def __init__(self) -> None:
        # None: nobody knows whether one is open.
        self._is_open: bool | None = False
        # What the open one is going to change when it commits.
        self._pending: Expected | None = None

    def committed(
        self, expected: Expected | None, statements: Statements, *, failed: bool
    ) -> Expected | None:
        """What is, or may be, committed now that ``statements`` ran; the rest is kept.

        ``expected`` is what they changed. More than was committed may be returned.
        """
        # Of a text that nobody looked into, it may do anything. "": nobody knows either.
        words = ("",) if statements.kinds is None else statements.transactions
        was_open = self._is_open
        if statements.kinds is None and failed and expected is None:
            words = ()
        if not words:
            if was_open is not False:
                self._pending = joined(self._pending, expected)
            return None if was_open else expected
        everything = joined(self._pending, expected)
        if statements.kinds is None or len(statements.kinds) > 1 or words == ("",):
            is_open = None if failed or not words[-1] else words[-1] == "begin"
            self._is_open = is_open
            self._pending = None if is_open is False else everything
            return everything
        if words == ("begin",):
            self._is_open = was_open if failed else True
            return None
        # A COMMIT that failed may leave the transaction open, which only ROLLBACK ends.
        self._is_open = None if failed else False
        self._pending = everything if failed else None
        return everything if words == ("commit",) else None
