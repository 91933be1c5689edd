"""What a SQL text is, before it runs: how many statements, of which kind, how deeply nested."""

from __future__ import annotations

import re
from typing import Any

import duckdb

from sqlrooms_server.db.effects import ANYTHING_CHANGES, Effect, effects_of, transactions_of
from sqlrooms_server.db.lexical import LITERAL_OR_COMMENT
from sqlrooms_server.errors import BadRequest

# DuckDB's parsers, and the one of 2.x above all, spend seconds and gigabytes on deep texts before
# they refuse them, and 1.5 takes 13 s to give 900 nested lists an Arrow type.
MAX_NESTING = 250

# The parser of 1.5 takes quadratic time for a chain of these, all of it holding the interpreter
# lock: a quarter of a second for this many, a minute for 300,000.
MAX_LOGICAL_OPERATORS = 20_000

# extract_statements holds the interpreter lock: 18 ms (1.5) to 184 ms (2.x) for 20,000 columns.
# A longer text is judged by its first word.
MAX_PARSED_LENGTH = 64 << 10

_MEMO_ENTRIES = 1024
_MEMO_TEXT_LENGTH = 4 << 10
# What the parser makes of a text is some thirty times as large.
_MEMO_PARSED_LENGTH = 1 << 10


_CHANGING = frozenset(
    "INSERT UPDATE DELETE MERGE_INTO COPY CREATE DROP ALTER ATTACH DETACH EXPORT".split()
)

_KINDS_BY_WORD = {
    "SELECT": "SELECT",
    "FROM": "SELECT",
    "VALUES": "SELECT",
    "INSERT": "INSERT",
    "UPDATE": "UPDATE",
    "DELETE": "DELETE",
    "CREATE": "CREATE",
}


class Statements:
    """What is known of one text before it runs.

    ``kinds`` are the kinds of its statements, in order, as DuckDB names them (``"SELECT"``):
    empty when it holds none, None when DuckDB could not say.

    ``texts`` are theirs: "" for one that DuckDB made of another. ``is_several``: so that each could
    be sent alone.

    ``parameters`` are the names of those of the last statement, None when they are not known.
    ``effects`` are what the statements may change, see :mod:`sqlrooms_server.db.effects`.
    ``transactions`` are "begin", "commit" or "rollback" for each of those that does that.
    ``parsed`` is the statement of a short text that holds one: running it instead of the text
    saves a quarter of the time of a small query, and makes no difference otherwise.
    ``width`` and ``schema_message`` are guesses from the last run of the same text, None before
    it: the number of columns it returned, and what :mod:`sqlrooms_server.db.results` made of them.
    """

    __slots__ = (
        "effects",
        "end_in_change",
        "is_one_select",
        "is_several",
        "kinds",
        "may_retry",
        "parameters",
        "parsed",
        "returns_rows",
        "schema_message",
        "sql",
        "texts",
        "transactions",
        "width",
    )

    def __init__(
        self,
        sql: str,
        kinds: tuple[str, ...] | None,
        parameters: frozenset[str] | None = None,
        effects: tuple[Effect, ...] = (),
        transactions: tuple[str, ...] = (),
        texts: tuple[str, ...] = (),
    ) -> None:
        last = kinds[-1] if kinds else ""
        self.sql = sql
        self.kinds = kinds
        self.parameters = parameters
        self.effects = effects
        self.transactions = transactions
        self.texts = texts
        self.is_several = len(texts) > 1 and "" not in texts
        self.parsed: duckdb.Statement | None = None
        self.width: int | None = None
        self.schema_message: Any = None
        # A single statement that returns rows and names no write target.
        self.is_one_select = kinds == ("SELECT",)
        # Each statement commits by itself, so that a second run of several would apply the
        # first ones twice.
        self.may_retry = kinds is not None and len(kinds) == 1 and last != "TRANSACTION"
        # The last statement is a query, of which even an empty result is a table. A PIVOT
        # statement is MULTI on 2.x.
        self.returns_rows = last in ("SELECT", "MULTI")
        # The last statement changes data or the catalog.
        self.end_in_change = last in _CHANGING


class Classifier:
    """Classifies SQL texts and remembers the short ones. Safe to call from any thread."""

    def __init__(self) -> None:
        self._memo: dict[str, Statements] = {}

    def classify(self, cursor: duckdb.DuckDBPyConnection, sql: str) -> Statements:
        """The statements of ``sql``. Raises ``BadRequest`` for a text no parser should meet.

        A syntax error is not reported here: the text then runs into it.
        """
        known = self._memo.get(sql)
        if known is not None:
            return known
        openings = sql.count("(") + sql.count("[") + sql.count("{")
        if openings > MAX_NESTING and nesting(sql) > MAX_NESTING:
            raise BadRequest(f"sql nests brackets deeper than {MAX_NESTING} levels.")
        # The shortest operator with the shortest operand takes four characters: "a or".
        if len(sql) > 4 * MAX_LOGICAL_OPERATORS and logical_operators(sql) > MAX_LOGICAL_OPERATORS:
            raise BadRequest(
                f"sql has more than {MAX_LOGICAL_OPERATORS} AND and OR; use IN or a join."
            )
        statements = _parsed(cursor, sql)
        if len(sql) <= _MEMO_TEXT_LENGTH:
            if len(self._memo) >= _MEMO_ENTRIES:
                self._memo.clear()
            self._memo[sql] = statements
        return statements


def _parsed(cursor: duckdb.DuckDBPyConnection, sql: str) -> Statements:
    if len(sql) > MAX_PARSED_LENGTH:
        kind = _kind_of_long(sql)
        if kind is None:
            return Statements(sql, None, effects=(ANYTHING_CHANGES,))
        return Statements(sql, (kind,), effects=effects_of((kind,), (sql,), sql))
    try:
        parsed = cursor.extract_statements(sql)
        kinds = tuple(statement.type.name for statement in parsed)
    except (duckdb.Error, ValueError):
        # ValueError: 2.x has kinds its Python enumeration does not know (UPDATE EXTENSIONS).
        return Statements(sql, None, effects=(ANYTHING_CHANGES,))
    if not parsed:
        return Statements(sql, ())
    try:
        texts = tuple(statement.query for statement in parsed)
    except (IndexError, ValueError):
        # 1.5 looks for the text of a PIVOT in the wrong place, which may be inside a character.
        texts = ("",) * len(kinds)
    parameters = frozenset(parsed[-1].named_parameters)
    statements = Statements(
        sql, kinds, parameters, effects_of(kinds, texts, sql), transactions_of(kinds, texts), texts
    )
    # A PRAGMA of 1.5 has become the text of another statement.
    if texts == (sql,) and len(sql) <= _MEMO_PARSED_LENGTH:
        statements.parsed = parsed[0]
    return statements


def _kind_of_long(sql: str) -> str | None:
    """The kind of a text that is certainly one statement; None for any other."""
    word = re.match(r"\s*(\w+)", sql)
    if word is None or ";" in sql.rstrip().rstrip(";"):
        return None
    return _KINDS_BY_WORD.get(word[1].upper())


_BRACKET_OR_LITERAL = re.compile(rf"{LITERAL_OR_COMMENT} | [][(){{}}]", re.VERBOSE | re.DOTALL)


def nesting(sql: str) -> int:
    """The depth of brackets outside of literals and comments, in time linear in the text."""
    depth = deepest = 0
    for match in _BRACKET_OR_LITERAL.finditer(sql):
        token = match[0]
        if token in ("(", "[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (")", "]", "}"):
            depth -= 1
    return deepest


_OPERATOR = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)


def logical_operators(sql: str) -> int:
    """How many AND and OR stand outside of literals and comments."""
    if len(_OPERATOR.findall(sql)) <= MAX_LOGICAL_OPERATORS:
        return 0
    code = _BRACKET_OR_LITERAL.sub(" ", sql)
    return len(_OPERATOR.findall(code))


def without_end(sql: str) -> str:
    """A single statement without the semicolons, comments and spaces after it."""
    end = 0
    position = 0
    for match in _BRACKET_OR_LITERAL.finditer(sql):
        end = _end_of_code(sql, position, match.start(), end)
        position = match.end()
        if not match[0].startswith(("--", "/*")):
            end = position
    return sql[: _end_of_code(sql, position, len(sql), end)]


# All that str.rstrip() takes away, and semicolons between it.
_SPACES_AND_ENDS = ";" + "".join(filter(str.isspace, map(chr, range(0x3001))))


def _end_of_code(sql: str, start: int, stop: int, before: int) -> int:
    """Where the last code of ``sql[start:stop]`` ends; ``before`` when there is none."""
    code = sql[start:stop].rstrip(_SPACES_AND_ENDS)
    return start + len(code) if code else before


def quote_identifier(name: str) -> str:
    """``name`` as a SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """``text`` as a SQL string literal."""
    return "'" + text.replace("'", "''") + "'"
