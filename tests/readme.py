"""The table of settings in README.md. `python -m tests.readme` renews it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sqlrooms_server.cli import size_text
from sqlrooms_server.settings import environment_variable, fields, flag

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- settings: made by python -m tests.readme -->\n"
END = "<!-- settings end -->\n"


def settings_table() -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in fields():
        rows.append(f"| `{flag(field.name)}` | {_default(field)} | {field.metadata['help']} |")
    example = environment_variable("db_path")
    rows.append(f"\nFor example, `--db-path` is also `{example}`, and `db_path = …` in the file.")
    return "\n".join(rows) + "\n"


def _default(field: dataclasses.Field[Any]) -> str:
    default: Any = field.default
    if field.metadata["unit"] == "size":
        return f"`{size_text(default)}`"
    if default in ("", (), False):
        return ""
    return f"`{default}`"


def renewed(text: str) -> str:
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + settings_table() + END + after


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
