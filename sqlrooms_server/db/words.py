"""What the words of a SQL text tell before DuckDB plans it.

DuckDB opens a file when it plans a statement that reads it, reads scripts when it parses
``IMPORT DATABASE``, and 2.x carries out some functions; so a text of somebody who may not do that
is looked at first. What is found here is too much rather than too little. What a statement does
is decided by its plan.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb

_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_WORD = re.compile(r"[^\W\d][\w$]*|[\w$]+")
_LITERAL = re.compile(r"'(?:[^']|'')*'")
_STRING = re.compile(r"(?:[eExXbB]|[uU]&)?'|\$")

# Words after which a table, view or function is named, of which the columns stand in brackets.
_NAMING = frozenset(
    "into table view exists references on macro function index with recursive".split()
)
# Words after which tables are named, with commas between them.
_TABLES_FOLLOW = frozenset(
    "from join using into update table describe desc summarize show pivot unpivot pivot_wider "
    "pivot_longer lateral only".split()
)
# Words that end a list of tables.
_TABLES_END = frozenset(
    "where group order select set values having qualify window limit offset returning on when "
    "union except intersect as by sample".split()
)
# Words that begin what can be described.
_QUERIES = frozenset("select from with values table pivot unpivot describe show all tables".split())
# Calls with FROM in their brackets.
_FROM_INSIDE = frozenset("extract trim substring overlay".split())
# Keywords that are functions, too.
_KEYWORD_FUNCTIONS = frozenset({"checkpoint", "glob"})

# Names of tables that DuckDB takes for files when there is no such table.
_FILE_NAME = re.compile(
    r"[/\\:*?\[]|\.(?:csv|tsv|txt|json|jsonl|ndjson|geojson|parquet|db|ddb|duckdb|sqlite|xlsx|avro"
    r"|arrows?|feather|gz|zst|bz2|lz4|zip|shp|gpkg|fgb|vortex|lance)\b",
    re.IGNORECASE,
)


class Unreadable(Exception):
    """The words of a text cannot be told. The text says why."""


@dataclass(frozen=True, slots=True)
class Token:
    """``kind`` is "word", "keyword", "quoted", "string", "number" or "operator".

    ``text`` is in lower case and without quotation marks; of a string as it is written.
    ``start`` counts bytes.
    """

    kind: str
    text: str
    start: int

    @property
    def is_name(self) -> bool:
        return self.kind in ("word", "quoted")

    def is_sign(self, text: str) -> bool:
        return self.text == text and self.kind == "operator"


def tokens_of(sql: str) -> list[Token]:
    """The tokens of ``sql``, as DuckDB's own lexer cuts them. Raises ``Unreadable``."""
    if "\0" in sql:
        raise Unreadable("it holds a NUL character")
    try:
        data = sql.encode()
        cuts = duckdb.tokenize(sql)
    except (duckdb.Error, ValueError) as error:
        raise Unreadable(str(error)) from error
    tokens: list[Token] = []
    for (start, kind), (end, _) in zip(cuts, [*cuts[1:], (len(data), None)], strict=True):
        if kind.name != "comment":
            text = data[start:end].decode(errors="replace")
            tokens.extend(_tokens(kind.name, text, start))
    return tokens


def _tokens(kind: str, text: str, start: int) -> Iterator[Token]:
    """What DuckDB calls one token, and what follows it: spaces and comments, or on 1.5 ``::``."""
    if kind == "string_const" or (kind != "operator" and _STRING.match(text)):
        plain = _LITERAL.match(text)
        yield Token("string", plain[0] if plain else text.rstrip(), start)
        return
    quoted = _QUOTED.match(text)
    if quoted:
        yield Token("quoted", quoted[0][1:-1].replace('""', '"').lower(), start)
        return
    word = _WORD.match(text)
    if word:
        is_number = kind == "numeric_const"
        name = "number" if is_number else "keyword" if kind == "keyword" else "word"
        yield Token(name, word[0].lower(), start)
        rest = text[word.end() :]
        if not is_number and re.match(r"[^\s/-]", rest):
            raise Unreadable(f"DuckDB reads {text[:40]!r} as one word")
    else:
        sign = re.split(r"\s|--|/\*", text.strip(), maxsplit=1)[0]
        yield Token("operator", sign, start)


def openings(tokens: Sequence[Token]) -> Iterator[list[str]]:
    """The words that each statement begins with, as many as may tell its kind."""
    start = 0
    for end in [*(i for i, token in enumerate(tokens) if token.is_sign(";")), len(tokens)]:
        while start < end and tokens[start].is_sign("("):
            start += 1
        if start < end:
            yield [token.text for token in tokens[start : min(end, start + 6)]]
        start = end + 1


def calls(tokens: Sequence[Token]) -> Iterator[tuple[str, int]]:
    """The names in lower case of what may be called, and where their brackets open."""
    closings = _closings(tokens)
    makes_macro = any(token.text in ("macro", "function") for token in tokens)
    for i, token in enumerate(tokens[:-1]):
        if not tokens[i + 1].is_sign("("):
            continue
        if token.is_name or token.text in _KEYWORD_FUNCTIONS:
            before = _before_name(tokens, i)
            if before is not None:
                if before.kind == "keyword" and before.text == "as" and not makes_macro:
                    continue
                if before.kind == "keyword" and before.text in _NAMING:
                    continue
                # An alias, or a type.
                if before.is_name or before.is_sign(")") or before.text == "::":
                    continue
                if before.is_sign(",") and _is_in_with(tokens, closings.get(i + 1)):
                    continue
            yield token.text, i + 1


def keyword_calls(tokens: Sequence[Token]) -> set[str]:
    """Keywords before brackets. Most belong to the syntax, some may be names of macros."""
    pairs = itertools.pairwise(tokens)
    return {one.text for one, other in pairs if one.kind == "keyword" and other.is_sign("(")}


def _closings(tokens: Sequence[Token]) -> dict[int, int]:
    """Where each round bracket that is closed closes."""
    closings = {}
    opened = []
    for i, token in enumerate(tokens):
        if token.is_sign("("):
            opened.append(i)
        elif token.is_sign(")") and opened:
            closings[opened.pop()] = i
    return closings


def _before_name(tokens: Sequence[Token], i: int) -> Token | None:
    """What stands before the name, perhaps a qualified one, that ends at ``i``."""
    while i >= 2 and tokens[i - 1].is_sign(".") and tokens[i - 2].kind != "operator":
        i -= 2
    return tokens[i - 1] if i else None


def _is_in_with(tokens: Sequence[Token], closing: int | None) -> bool:
    """Whether ``AS (`` stands behind the bracket, as in ``WITH x (…) AS (…), name (…) AS (…)``."""
    if closing is None:
        return False
    after = [token for token in tokens[closing + 1 : closing + 5] if token.kind != "quoted"]
    text = " ".join(token.text for token in after)
    return re.match(r"as (?:(?:not )?materialized )?\(", text) is not None


def file_names(tokens: Sequence[Token]) -> Iterator[str]:
    """What stands where tables are named and may be taken for a file."""
    for parts in table_names(tokens):
        name = ".".join(token.text for token in parts)
        if parts[0].kind == "string" or _FILE_NAME.search(name):
            yield name


def table_names(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """The parts of each name that stands where tables are named, and of some that are none."""
    # For each open bracket whether tables are listed in it, and whether FROM means none.
    states = [False]
    no_tables = [False]
    is_next = False
    i = 0
    while i < len(tokens):
        token = tokens[i]
        text = token.text if token.kind in ("keyword", "operator") else ""
        if text == "(":
            before = tokens[i - 1].text if i else ""
            states.append(is_next)
            no_tables.append(before in _FROM_INSIDE)
        elif text == ")":
            if len(states) > 1:
                states.pop()
                no_tables.pop()
            is_next = False
        elif text == "from" and (no_tables[-1] or (i and tokens[i - 1].text == "distinct")):
            is_next = False
        elif text in _TABLES_FOLLOW:
            is_next = states[-1] = True
        elif text in _TABLES_END or text == ";":
            is_next = states[-1] = False
        elif text == ",":
            is_next = states[-1]
        elif is_next and (token.is_name or token.kind in ("string", "keyword")):
            parts = _dotted(tokens, i)
            i += 2 * len(parts) - 1
            is_call = i < len(tokens) and tokens[i].is_sign("(")
            if token.kind == "string" or not is_call:
                yield parts
            is_next = False
            continue
        i += 1


def has_inner_description(tokens: Sequence[Token]) -> bool:
    """Whether something is described or shown inside of a statement. DESC also orders rows."""
    for i in range(1, len(tokens)):
        token = tokens[i]
        if token.kind != "keyword" or token.text not in ("describe", "desc", "show"):
            continue
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        is_described = after is not None and (
            after.is_name or after.kind == "string" or after.is_sign("(") or after.text in _QUERIES
        )
        is_outermost = tokens[i - 1].text in ("explain", "analyze", ";") or (
            tokens[0].text == "explain" and tokens[i - 1].is_sign(")")
        )
        if is_described and not is_outermost and not tokens[i - 1].is_sign("."):
            return True
    return False


def _dotted(tokens: Sequence[Token], i: int) -> Sequence[Token]:
    """The parts of the name that begins at ``i``."""
    parts = [tokens[i]]
    i += 1
    while i + 1 < len(tokens) and tokens[i].is_sign(".") and tokens[i + 1].kind != "operator":
        parts.append(tokens[i + 1])
        i += 2
    return parts


def literal_paths(tokens: Sequence[Token], bracket: int) -> list[str] | None:
    """The paths that are the first argument of the call whose bracket opens at ``bracket``.

    None when they are not plain literals, or a list of such.
    """
    paths = []
    i = bracket + 1
    is_list = i < len(tokens) and tokens[i].is_sign("[")
    i += is_list
    while i < len(tokens) and tokens[i].kind == "string":
        path = plain_text(tokens[i].text)
        if path is None:
            return None
        paths.append(path)
        i += 1
        if is_list and i < len(tokens) and tokens[i].is_sign(","):
            i += 1
            continue
        break
    if is_list:
        if i >= len(tokens) or not tokens[i].is_sign("]"):
            return None
        i += 1
    ends = i < len(tokens) and (tokens[i].is_sign(",") or tokens[i].is_sign(")"))
    return paths if paths and ends else None


def plain_text(literal: str) -> str | None:
    """The text of a plain string literal; None for one that is written in another way."""
    if not _LITERAL.fullmatch(literal):
        return None
    return literal[1:-1].replace("''", "'")
