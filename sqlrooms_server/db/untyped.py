"""Queries whose parameters have no types yet, which DuckDB 1.5 cannot plan."""

from __future__ import annotations

import json
from typing import Any

import duckdb


def without_parameters(native: duckdb.DuckDBPyConnection, sql: str) -> str | None:
    """``sql``, a SELECT, with NULL for each parameter: 1.5 plans no parameter without a type.

    None when that cannot be written for sure.
    """
    try:
        serialized = native.execute(
            "SELECT json_serialize_sql($1), json_serialize_sql('SELECT NULL')", [sql]
        ).fetchall()
        tree, null = (json.loads(text) for text in serialized[0])
        if tree["error"]:
            return None
        constant = null["statements"][0]["node"]["select_list"][0]
        replaced = _replaced(tree, constant)
        for statement in replaced["statements"]:
            statement["named_param_map"] = []
        text: str = native.execute(
            "SELECT json_deserialize_sql($1)", [json.dumps(replaced)]
        ).fetchall()[0][0]
        again = native.execute("SELECT json_serialize_sql($1)", [text]).fetchall()[0][0]
        return text if _bare(json.loads(again)) == _bare(replaced) else None
    except (duckdb.Error, ValueError, KeyError, RecursionError):
        return None


def _replaced(tree: Any, constant: Any) -> Any:
    if isinstance(tree, list):
        return [_replaced(item, constant) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if tree.get("class") == "PARAMETER":
        return {**constant, "alias": tree.get("alias", "")}
    return {name: _replaced(value, constant) for name, value in tree.items()}


def _bare(tree: Any) -> Any:
    """``tree`` without where things stand in the text."""
    if isinstance(tree, list):
        return [_bare(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    skipped = ("query_location", "query_location_length")
    return {name: _bare(value) for name, value in tree.items() if name not in skipped}
