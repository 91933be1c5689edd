"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sqlrooms_server"

# Each part may import itself and what stands before it.
LAYERS = [
    ["client"],
    ["query_command"],
    ["errors"],
    ["settings"],
    ["app_config"],
    ["configuration"],
    ["messages"],
    ["protocol"],
    ["timers"],
    ["jobs"],
    ["memory"],
    ["cache"],
    ["db"],
    ["rooms"],
    ["transport"],
    ["access"],
    ["outbox"],
    ["peer"],
    ["plugin"],
    ["rates"],
    ["gate"],
    ["routing"],
    ["hub"],
    ["features"],
    ["plugins"],
    ["builtin"],
    ["token_command"],
    ["types_command"],
    ["database"],
    ["together"],
    ["databases"],
    ["mounts"],
    ["app"],
    ["server"],
    ["cli"],
    ["__main__"],
]

# These import nothing of the server, since nothing of it stands before them.
CLIENT = {"client", "query_command"}

OWNERS = {
    "socketify": set(),
    "cffi": set(),
    "_cffi_backend": {"transport/native_types.py"},
    "diskcache": {"cache/"},
    "duckdb": {"db/"},
    "jwt": {"access/signed.py"},
    "loro": {"rooms/documents.py"},
    "pyarrow": {"db/", "client/", "query_command/"},
    "websockets": {"client/"},
    "ujson": {"protocol/", "db/json_rows.py", "db/plans.py", "client/"},
    "tomllib": {"configuration.py"},
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    return [
        (str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8")))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


@cache
def nodes(tree: ast.Module) -> list[ast.AST]:
    return list(ast.walk(tree))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module


def part(name: str) -> str:
    return name.removesuffix(".py").split("/")[0]


def test_a_part_imports_only_what_stands_before_it() -> None:
    order = {name: number for number, names in enumerate(LAYERS) for name in names}
    for name, tree in modules():
        mine = part(name)
        for imported in imports(tree):
            pieces = imported.split(".")
            if pieces[0] != "sqlrooms_server" or len(pieces) == 1 or name == "__init__.py":
                continue
            assert order[pieces[1]] <= order[mine], f"{name} imports {imported}"
            if pieces[1] in CLIENT:
                allowed = {*CLIENT, "cli"} if pieces[1] == "query_command" else CLIENT
                assert mine in allowed, f"{name} imports {imported}: the server needs no client"


def test_every_part_has_its_place() -> None:
    known = {name for names in LAYERS for name in names} | {"__init__"}
    assert {part(name) for name, _ in modules()} == known


def test_each_dependency_has_one_owner() -> None:
    for name, tree in modules():
        for imported in imports(tree):
            owners = OWNERS.get(imported.split(".")[0])
            if owners is not None:
                assert any(name == o or (o.endswith("/") and name.startswith(o)) for o in owners), (
                    f"{name} imports {imported}, which belongs to {owners}"
                )


def test_broad_excepts_are_marked_guards() -> None:
    for name, tree in modules():
        lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
        for node in nodes(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                if caught in ("", "Exception", "BaseException"):
                    line = lines[node.lineno - 1]
                    is_cleanup = any(
                        isinstance(statement, ast.Raise) and statement.exc is None
                        for statement in node.body
                    )
                    assert is_cleanup or "guard" in line or "handed" in line, f"{name}: {line}"


def test_no_module_state() -> None:
    """Two servers live in one process: module-level names are constants, types and functions."""
    for name, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(target) != "__all__":
                    is_mutable = isinstance(node.value, ast.List | ast.Set | ast.ListComp)
                    assert not is_mutable, f"{name}:{node.lineno}"
