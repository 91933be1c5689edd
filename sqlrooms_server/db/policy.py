"""What the SQL of a client may do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from sqlrooms_server.errors import Forbidden

# What DuckDB calls the kinds of statements that a text may hold.
KINDS = frozenset(
    "ALTER ANALYZE ATTACH CALL COPY COPY_DATABASE CREATE DELETE DETACH DROP EXECUTE EXPLAIN "
    "EXPORT INSERT LOAD MERGE_INTO PRAGMA PREPARE SELECT SET TRANSACTION UPDATE VACUUM "
    "VARIABLE_SET".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Two clients with equal policies may share results.

    ``read_only``: nothing is changed, in the database or in a file. ``files``: whatever is outside
    of the database can be reached: files, the network, other databases, and settings that lead
    there. ``extensions``: more of DuckDB can be installed and loaded. ``schemas``: those of the
    main database whose tables can be read and changed, in lower case; None for all. ``kinds``:
    the statements that may run, as DuckDB names their kinds (``"SELECT"``); None for all.
    ``source`` tells people where the policy comes from.

    Tables can be told from each other only inside of the database, so with ``schemas`` nothing
    outside can be reached, whatever ``files`` says.
    """

    read_only: bool = False
    files: bool = True
    extensions: bool = True
    schemas: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    source: str = field(default="", compare=False)

    @property
    def is_open(self) -> bool:
        """Whether it forbids nothing."""
        return self is UNRESTRICTED or self == UNRESTRICTED

    @property
    def is_inside(self) -> bool:
        """Whether nothing outside of the database can be reached."""
        return not self.files or self.schemas is not None

    def refuse(self, what: str, why: str) -> NoReturn:
        """Raise ``Forbidden``. ``why`` tells what would do instead, if anything would."""
        rule = self.source or "the rules for this connection"
        raise Forbidden(f"{what} is refused by {rule}: {why}.")

    def within(self, other: Policy) -> Policy:
        """What both allow."""
        return Policy(
            read_only=self.read_only or other.read_only,
            files=self.files and other.files,
            extensions=self.extensions and other.extensions,
            schemas=_both(self.schemas, other.schemas),
            kinds=_both(self.kinds, other.kinds),
            source=" and ".join(filter(None, (self.source, other.source))),
        )


def _both(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    return one & other


UNRESTRICTED = Policy()
