"""What a SQL text is before it runs."""

from __future__ import annotations

import time
import tracemalloc

import duckdb
import pytest

from sqlrooms_server.db.effects import effects_of, has_changing_word
from sqlrooms_server.db.room_macros import wanted_rooms
from sqlrooms_server.db.statements import (
    MAX_PARSED_LENGTH,
    Classifier,
    nesting,
    quote_identifier,
    quote_literal,
    without_end,
)


@pytest.mark.parametrize(
    ("sql", "kinds", "one_select", "retry", "rows", "change"),
    [
        ("select 1", ("SELECT",), True, True, True, False),
        ("insert into t values (1)", ("INSERT",), False, True, False, True),
        ("select 1; insert into t values (1)", ("SELECT", "INSERT"), False, False, False, True),
        ("insert into t values (1); select 1", ("INSERT", "SELECT"), False, False, True, False),
        ("begin", ("TRANSACTION",), False, False, False, False),
        ("", (), False, False, False, False),
        ("-- nothing", (), False, False, False, False),
        ("selec", None, False, False, False, False),
    ],
)
def test_kinds(
    sql: str,
    kinds: tuple[str, ...] | None,
    one_select: bool,
    retry: bool,
    rows: bool,
    change: bool,
) -> None:
    with duckdb.connect() as connection:
        statements = Classifier().classify(connection, sql)
    assert statements.kinds == kinds
    assert statements.is_one_select is one_select
    assert statements.may_retry is retry
    assert statements.returns_rows is rows
    assert statements.end_in_change is change


@pytest.mark.parametrize(
    ("start", "end", "kinds"),
    [
        ("insert into t values ", "", ("INSERT",)),
        ("  CREATE table t as values ", " ; \n", ("CREATE",)),
        ("select 1; insert into t values ", "", None),
        ("with x as (select 1) insert into t values ", "", None),
        ("-- note\ninsert into t values ", "", None),
    ],
)
def test_long_texts_are_judged_by_their_first_word(
    start: str, end: str, kinds: tuple[str, ...] | None
) -> None:
    sql = start + ",".join(["(1)"] * MAX_PARSED_LENGTH) + end
    with duckdb.connect() as connection:
        assert Classifier().classify(connection, sql).kinds == kinds


def test_the_memo_is_bounded() -> None:
    classifier = Classifier()
    with duckdb.connect() as connection:
        for number in range(3000):
            classifier.classify(connection, f"select {number}")
    assert len(classifier._memo) <= 1024


@pytest.mark.parametrize(
    ("sql", "depth"),
    [
        ("select 1", 0),
        ("((()))()", 3),
        ("[{(", 3),
        ("'((('", 0),
        ("'it''s ((' (", 1),
        ('"((" (', 1),
        ("-- ((((\n(", 1),
        ("/* (((( */ (", 1),
        ("/* (((", 0),
        ("$$ (( $$ (", 1),
        ("$tag$ (( $x$ (( $tag$ (", 1),
        ("e'\\'((' (", 1),
        ("E'\\\\' ((", 2),
        ("select t$x$ (((", 3),
        ("select \u2603$x$ (((", 3),
        ("select $x$ ((( $x$ (", 1),
    ],
)
def test_nesting(sql: str, depth: int) -> None:
    assert nesting(sql) == depth


@pytest.mark.parametrize("piece", ["/*", "$$", "$a$", "'", '"', "e'", "--", "$a"])
def test_nesting_takes_linear_time(piece: str) -> None:
    """A quadratic scan of these texts would take hours; the deadline of the test is minutes."""
    began = time.monotonic()
    nesting(piece * 500_000)
    nesting((piece + " ") * 500_000)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("sql", "code"),
    [
        ("select 1", "select 1"),
        ("select 1;", "select 1"),
        ("select 1 ; -- the end; really\n ;; /* x; */ ", "select 1"),
        ("select ';' ;", "select ';'"),
        ("select '--' -- x", "select '--'"),
        ("select (1);", "select (1)"),
        ("/* a */ select /* b */ 1 /* c */", "/* a */ select /* b */ 1"),
        ("select 1 ;\u00a0; \x0b;", "select 1"),
    ],
)
def test_without_end(sql: str, code: str) -> None:
    assert without_end(sql) == code


def test_quoting() -> None:
    assert quote_identifier('a"b') == '"a""b"'
    assert quote_literal("it's") == "'it''s'"


_LONG = 1 << 17


@pytest.mark.parametrize(
    ("kind", "sql"),
    [
        ("CREATE", "create table" + " " * _LONG + "if" + " " * _LONG),
        ("INSERT", "insert" + "/**/" * (_LONG // 4)),
        ("INSERT", "insert " + "--\n" * (_LONG // 3)),
        ("INSERT", "insert into /*" + "a" * _LONG),
        ("INSERT", 'insert into "' + "a" * _LONG),
        ("UPDATE", "update " + '"' * _LONG),
        ("SELECT", "select update /*" + "/" * _LONG),
        ("SELECT", "select update E'" + "a" * _LONG),
        ("SELECT", "from room('" + "a" * _LONG + "')"),
        ("SELECT", "from room('" + "'" * _LONG),
    ],
    ids=lambda part: part[:20],
)
def test_looking_at_a_long_text_takes_little_memory(kind: str, sql: str) -> None:
    """It took up to 250 times the text, and all of it with the interpreter lock held."""
    tracemalloc.start()
    try:
        effects_of((kind,), (sql,), sql)
        has_changing_word(sql)
        nesting(sql)
        wanted_rooms(sql, None)
        without_end(sql)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A copy or two of the text.
    assert peak < 10 * len(sql)


@pytest.mark.parametrize(
    ("sql", "changes"),
    [
        ("select 1 /* update */", False),
        ("select 1 /* a /* b */ update */", True),
        ("select 1 */* update */", True),
        ("/* a */ select '/*' /* update */", True),
    ],
)
def test_words_in_comments_that_may_be_none(sql: str, changes: bool) -> None:
    """DuckDB nests comments; who does not would take code for one."""
    assert has_changing_word(sql) is changes
