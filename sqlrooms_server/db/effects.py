"""What a statement may change, as far as its kind and its first words tell.

The words are those of a text that DuckDB has parsed as a statement of that kind, so that what
stands between ``INSERT INTO`` and the next space or bracket is its target. Where they leave a
doubt, the answer is that anything may change.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import NamedTuple

from sqlrooms_server.db.lexical import LITERAL_OR_COMMENT


class Effect(NamedTuple):
    """What one statement may change.

    ``targets`` are names as they stand in the text. ``created`` ones may be there only afterwards,
    ``renamed`` is what the target is called then. ``by_plan``: its plan tells the targets. See
    :class:`versions.Change` for the others.
    """

    op: str
    targets: tuple[str, ...] = ()
    created: tuple[str, ...] = ()
    renamed: str = ""
    catalog: bool = False
    unknown: bool = False
    by_plan: bool = False
    settings: bool = False


ANYTHING_CHANGES = Effect("change", catalog=True, unknown=True, settings=True)
_SETTINGS = Effect("change", catalog=True, settings=True)

# What separates words for every version of DuckDB: other characters that Python calls space belong
# to names. DuckDB nests comments, and 1.5 ends one at a carriage return; such ones are none here.
_SPACE = r"[ \t\n\v\f\r]"
# No group is repeated for each character, nor without end, since Python takes two hundred bytes for
# each time; who has more comments or quotes in one place is not understood.
_COMMENT_TEXT = r"(?:--[^\r\n]*(?:\r?\n|\Z)|/\*[^*/]*(?:(?:\*(?!/)|/(?!\*))[^*/]*)*\*/)"
_SKIPPED = rf"{_SPACE}*(?:{_COMMENT_TEXT}{_SPACE}*){{0,1000}}"
_GAP = rf"(?:{_SPACE}|{_COMMENT_TEXT}){_SKIPPED}"
_PART = r'(?:[^\W\d][\w$]*|"(?:[^"]|"")[^"]*(?:""[^"]*){0,255}")'
# Whole: no point may follow, nor a comment that hides one, nor a character that could belong to
# the name. IF begins what may stand before it.
_NAME = (
    rf"(?P<name>(?!IF\b){_PART}(?:\.{_PART}){{0,2}})"
    rf"(?={_SPACE}|[(;]|\Z)(?!{_SPACE}*(?:\.|--|/\*))"
)
_CREATE = r"CREATE\s+(?:OR\s+REPLACE\s+)?"

# These, as far as _BEGIN_OR_END, are texts: _match compiles one when it is first needed.
_TARGETS = {
    "INSERT": rf"INSERT\s+(?:OR\s+(?:REPLACE|IGNORE)\s+)?INTO\s+{_NAME}",
    "UPDATE": rf"UPDATE\s+{_NAME}",
    "DELETE": rf"(?:DELETE\s+FROM|TRUNCATE(?:\s+TABLE)?)\s+{_NAME}",
    "MERGE_INTO": rf"MERGE\s+INTO\s+{_NAME}",
    "COPY": rf'COPY\s+{_NAME}\s*(?:\([^)"]*\)\s*)?FROM\b',
}
_OPS = {"MERGE_INTO": "merge"}

_COPY_TO_FILE = rf'COPY\s*(?:\(|{_NAME}\s*(?:\([^)"]*\)\s*)?TO\b)'
_CREATE_TEMPORARY = rf"{_CREATE}(?:TEMP|TEMPORARY)\b"
_CREATE_TABLE = rf"{_CREATE}(?:TABLE|VIEW)\s+(?:IF\s+NOT\s+EXISTS\s+)?{_NAME}"
_DROP_TABLE = (
    rf"DROP\s+(?:TABLE|VIEW)\s+(?:IF\s+EXISTS\s+)?{_NAME}(?:\s+(?:CASCADE|RESTRICT))?\s*(?:;\s*)?$"
)
_CREATE_OTHER = (
    rf"{_CREATE}(?:(?:PERSISTENT\s+)?SECRET|(?:UNIQUE\s+)?INDEX|SCHEMA|SEQUENCE|MACRO|FUNCTION|"
    r"TYPE)\b"
)
_DROP_OTHER = r"DROP\s+(?:INDEX|SEQUENCE|MACRO|FUNCTION|TYPE|SECRET|TRIGGER)\b"
_DEALLOCATE = r"DEALLOCATE\b"
_ALTER_TABLE = (
    rf"ALTER\s+(?:TABLE|VIEW)\s+(?:IF\s+EXISTS\s+)?{_NAME}"
    rf"(?:\s+RENAME\s+TO\s+(?P<new>{_PART})\s*(?:;\s*)?$)?"
)
_COMMENT = r"COMMENT\s+ON\b"
_CHECKPOINT = r"(?:FORCE\s+)?CHECKPOINT\b"
_READING_PRAGMA = (
    r"PRAGMA\s+(?:table_info|show_tables|show_tables_expanded|show_databases|database_list|"
    r"database_size|storage_info|version|platform|functions|collations|show|user_agent|"
    r"metadata_info)\b"
)
_PIVOT = r"(?:PIVOT|UNPIVOT|WITH|FROM|SELECT)\b"
_BEGIN_OR_END = r"(?P<word>\w+)"
_MEANINGS = {
    "begin": "begin",
    "start": "begin",
    "commit": "commit",
    "end": "commit",
    "rollback": "rollback",
    "abort": "rollback",
}

_CASCADE = re.compile(r"\bcascade\b", re.IGNORECASE)
_CHANGING_WORD = re.compile(
    r"\b(?:insert|update|delete|merge|truncate|create|drop|alter)\b", re.IGNORECASE
)
_ANALYZE = re.compile(r"\banaly[sz]e\b", re.IGNORECASE)
_OTHER_STATEMENT = re.compile(
    r"\b(?:copy|call|attach|detach|pragma|execute|import|set|load|use)\b", re.IGNORECASE
)
# Where the versions of DuckDB may differ about what is code, or this module from them: parameters
# and names hold dollars, too.
_DOUBTFUL = re.compile(r"[$\\]|\r(?!\n)|\*/\*")
_MARK_OF_COMMENT = re.compile(r"/\*|\*/")
_LITERAL_OR_COMMENT = re.compile(LITERAL_OR_COMMENT, re.VERBOSE | re.DOTALL)

_SILENT_KINDS = frozenset({"SET", "VARIABLE_SET", "LOAD", "VACUUM", "ANALYZE"})
_RENAMING_KINDS = frozenset({"SET", "VARIABLE_SET", "ATTACH", "DETACH"})
_HARMLESS_KINDS = frozenset({"TRANSACTION", "PREPARE", "EXPORT"})


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    # Not when this module is loaded: all of them take as long as opening a database.
    pattern = pattern.replace(r"\s+", _GAP).replace(r"\s*", _SKIPPED)
    return re.compile(_SKIPPED + pattern, re.IGNORECASE | re.DOTALL)


def _match(pattern: str, text: str) -> re.Match[str] | None:
    """``pattern`` where a statement begins; its ``\\s`` may also be comments."""
    return _compiled(pattern).match(text)


def has_changing_word(sql: str) -> bool:
    """Whether ``sql`` may hold a clause that changes something, outside literals and comments."""
    if _CHANGING_WORD.search(sql) is None:
        return False
    if _DOUBTFUL.search(sql) is not None or _nests_comments(sql):
        return True
    return _CHANGING_WORD.search(_LITERAL_OR_COMMENT.sub(" ", sql)) is not None


def _nests_comments(sql: str) -> bool:
    marks = (match[0] for match in _MARK_OF_COMMENT.finditer(sql))
    return any(pair == ("/*", "/*") for pair in itertools.pairwise(marks))


def effects_of(kinds: tuple[str, ...], texts: tuple[str, ...], sql: str) -> tuple[Effect, ...]:
    """What the statements of ``sql``, of these kinds and texts, may change."""
    if "" in texts:
        # PIVOT on 1.5 is two statements without a text: one makes a temporary type.
        is_pivot = kinds == ("CREATE", "SELECT") and _of_multi(sql) is None
        return () if is_pivot else (ANYTHING_CHANGES,)
    effects = [_effect_of(kind, text) for kind, text in zip(kinds, texts, strict=True)]
    found = tuple(effect for effect in effects if effect is not None)
    if len(found) > 1 and not _RENAMING_KINDS.isdisjoint(kinds):
        # What a name means may change on the way.
        return (ANYTHING_CHANGES,)
    return found


def transactions_of(kinds: tuple[str, ...], texts: tuple[str, ...]) -> tuple[str, ...]:
    """ "begin", "commit" or "rollback" for each statement that does that, in order; "" is any."""
    words = []
    for kind, text in zip(kinds, texts, strict=True):
        if kind == "TRANSACTION":
            match = _match(_BEGIN_OR_END, text)
            words.append(_MEANINGS.get(match["word"].lower(), "") if match else "")
    return tuple(words)


def _effect_of(kind: str, text: str) -> Effect | None:
    """What a statement of ``kind`` (as DuckDB names it) may change; None for nothing."""
    if kind == "SELECT":
        # 2.x has WITH x AS (INSERT … RETURNING …) SELECT.
        return Effect("change", by_plan=True) if has_changing_word(text) else None
    if kind in _TARGETS:
        return _of_rows(kind, text)
    if kind in _HARMLESS_KINDS:
        return None
    if kind in _SILENT_KINDS:
        return _SETTINGS
    special = _SPECIAL.get(kind)
    return ANYTHING_CHANGES if special is None else special(text)


def _of_rows(kind: str, text: str) -> Effect:
    op = _OPS.get(kind, kind.lower())
    match = _match(_TARGETS[kind], text)
    if match is not None:
        return Effect(op, (match["name"],))
    if kind != "COPY":
        return Effect(op, by_plan=True)
    if _match(_COPY_TO_FILE, text) and not has_changing_word(text):
        return Effect("copy", catalog=True)
    return ANYTHING_CHANGES


def _of_create(text: str) -> Effect | None:
    match = _match(_CREATE_TEMPORARY, text)
    if match is not None:
        return ANYTHING_CHANGES if has_changing_word(text[match.end() :]) else None
    match = _match(_CREATE_TABLE, text)
    if match is None:
        return Effect("create", catalog=True, unknown=_match(_CREATE_OTHER, text) is None)
    # The word CREATE itself is one.
    writes_more = has_changing_word(text[match.end() :])
    return Effect("create", created=(match["name"],), catalog=True, unknown=writes_more)


def _of_drop(text: str) -> Effect | None:
    if _match(_DEALLOCATE, text):
        return None
    match = _match(_DROP_TABLE, text)
    if match is not None:
        return Effect("drop", (match["name"],), catalog=True)
    if _match(_DROP_OTHER, text) is None:
        return ANYTHING_CHANGES
    # With a sequence or a type go the tables that use it.
    return Effect("drop", catalog=True, unknown=_CASCADE.search(text) is not None)


def _of_alter(text: str) -> Effect:
    match = _match(_ALTER_TABLE, text)
    if match is None:
        return Effect("alter", catalog=True) if _match(_COMMENT, text) else ANYTHING_CHANGES
    return Effect("alter", (match["name"],), renamed=match["new"] or "", catalog=True)


def _of_explain(text: str) -> Effect | None:
    if not _ANALYZE.search(text):
        return None
    only_reads = not has_changing_word(text) and not _OTHER_STATEMENT.search(text)
    return None if only_reads else ANYTHING_CHANGES


def _of_call(text: str) -> Effect | None:
    return None if _match(_CHECKPOINT, text) else ANYTHING_CHANGES


def _of_pragma(text: str) -> Effect | None:
    return None if _match(_READING_PRAGMA, text) else ANYTHING_CHANGES


def _of_multi(text: str) -> Effect | None:
    is_pivot = _match(_PIVOT, text) is not None and not has_changing_word(text)
    return None if is_pivot else ANYTHING_CHANGES


_SPECIAL = {
    "CREATE": _of_create,
    "DROP": _of_drop,
    "ALTER": _of_alter,
    "EXPLAIN": _of_explain,
    "CALL": _of_call,
    "PRAGMA": _of_pragma,
    "MULTI": _of_multi,
}
