"""What a statement reads and writes, from the plan that DuckDB makes of it.

The plan is the one of ``json_serialize_plan``, bound and not optimised: views, macros and ``WITH``
are expanded, tables have their full names. DuckDB does not serialise every plan; of those it does
not, nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import duckdb
import ujson

from sqlrooms_server.db.versions import Table, Versions, key_of

_MEMO_ENTRIES = 1024
_MEMO_TEXT_LENGTH = 16 << 10

# The plan of a list of 500,000 numbers holds the interpreter lock for seconds.
MAX_PLANNED_LENGTH = 64 << 10

# The nodes of plans that read, and of no others.
_READING_NODES = frozenset(
    "PROJECTION FILTER AGGREGATE_AND_GROUP_BY WINDOW UNNEST LIMIT ORDER_BY TOP_N DISTINCT PIVOT "
    "GET CHUNK_GET DELIM_GET EXPRESSION_GET DUMMY_SCAN EMPTY_RESULT CTE_REF MATERIALIZED_CTE "
    "RECURSIVE_CTE JOIN DELIM_JOIN COMPARISON_JOIN ANY_JOIN CROSS_PRODUCT POSITIONAL_JOIN "
    "ASOF_JOIN DEPENDENT_JOIN UNION EXCEPT INTERSECT".split()
)
_WRITING_NODES = frozenset("INSERT UPDATE DELETE MERGE_INTO".split())
_DEFINING_NODES = ("CREATE_", "DROP", "ALTER")

# Table functions whose rows follow from their arguments.
_GENERATORS = frozenset(
    "range generate_series unnest repeat repeat_row json_each json_tree".split()
)

# Marked as consistent, but the first three read the clock, age() with one argument only, and the
# others settings and the catalog.
# error() is marked as volatile, but stands in the plan of every scalar subquery.
_NOT_CONSISTENT = frozenset(
    "age current_localtime current_localtimestamp current_setting getvariable index_key "
    "json_serialize_plan".split()
)
_CONSISTENT = frozenset({"error", "__cast"})

_CALLS = ("BOUND_FUNCTION", "BOUND_AGGREGATE", "BOUND_WINDOW")

# The parts of expressions that call nothing by themselves.
_EXPRESSIONS = frozenset(
    "BOUND_BETWEEN BOUND_CASE BOUND_CAST BOUND_COLUMN_REF BOUND_COMPARISON BOUND_CONJUNCTION "
    "BOUND_CONSTANT BOUND_DEFAULT BOUND_EXPANDED BOUND_LAMBDA BOUND_LAMBDA_REF BOUND_OPERATOR "
    "BOUND_PARAMETER BOUND_REF BOUND_SUBQUERY BOUND_UNNEST".split()
)

# How a plan numbers the column rowid.
_ROW_ID = (1 << 64) - 1

# Functions that change something when they run, which nobody may do again and again unasked.
_SIDE_EFFECTS = frozenset({"nextval", "setval", "setseed", "write_log"})


class Unplannable(Exception):
    """DuckDB gives no plan. The text says why, ``kind`` is DuckDB's word for the kind of error."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Plan:
    """What stands in one plan. ``nodes`` are those that are neither known to read nor to write.

    ``row_ids`` counts the scans whose rowid may be used. ``targets`` are the full names of what is
    created, dropped or altered, or as much of them as DuckDB knows. ``calls`` are functions in what
    is only bound when it is used: macros and defaults. ``views`` are queries of views to create,
    as ``json_deserialize_sql`` takes them.
    """

    reads: list[Table] = field(default_factory=list)
    writes: list[Table] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)
    table_functions: set[str] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    row_ids: int = 0
    targets: list[tuple[str, ...]] = field(default_factory=list)
    sequences: list[Table] = field(default_factory=list)
    calls: set[str] = field(default_factory=set)
    views: list[str] = field(default_factory=list)


def plan_of(native: duckdb.DuckDBPyConnection, sql: str) -> Plan:
    """The plan of one statement, which is not run. Raises ``Unplannable``.

    DuckDB 2.x carries out some functions when it binds them, ``enable_logging()`` for one; whoever
    may run the statement may plan it.
    """
    try:
        rows = native.execute("SELECT json_serialize_plan(?, optimize := false)", [sql]).fetchall()
        serialized = ujson.loads(rows[0][0])
    except duckdb.InterruptException:
        raise
    except (duckdb.Error, ValueError) as error:
        raise Unplannable(str(error)) from error
    if serialized.get("error"):
        reason = str(serialized.get("error_message"))
        if serialized.get("error_type") == "internal":
            # What DuckDB 1.5 does with a parameter whose type does not follow from where it stands.
            reason += " Write the types of its parameters, such as $n::INTEGER"
        raise Unplannable(reason, str(serialized.get("error_type")))
    plan = Plan()
    _collect(serialized["plans"], plan)
    return plan


def _collect(value: Any, plan: Plan) -> None:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            kind = value.get("type")
            if isinstance(kind, str) and kind.startswith("LOGICAL_"):
                _collect_node(kind.removeprefix("LOGICAL_"), value, plan)
            expression = value.get("expression_class")
            if expression in _CALLS:
                name = _function_name(value)
                # Window functions such as row_number() have none.
                if name or expression != "BOUND_WINDOW":
                    plan.functions.add(name)
                source = (value.get("function_data") or {}).get("sequence_create_info")
                if source:
                    plan.sequences.append(_named(source))
            elif expression is not None and expression not in _EXPRESSIONS:
                plan.nodes.add(str(expression))
            elif "function_name" in value:
                plan.calls.add(str(value["function_name"]).lower())
            waiting.extend(value.values())


def _collect_node(kind: str, node: dict[str, Any], plan: Plan) -> None:
    if kind == "GET":
        function = _function_name(node)
        source = node.get("function_data") or {}
        if function == "seq_scan":
            plan.reads.append((source["catalog"], source["schema"], source["table"]))
            plan.row_ids += _ROW_ID in _columns(node)
        else:
            plan.table_functions.add(function)
        if (node.get("extra_info") or {}).get("sample_options"):
            plan.nodes.add("SAMPLE")
    elif kind in _WRITING_NODES:
        plan.writes.append(_named(node.get("table_info") or node["info"]))
    elif kind not in _READING_NODES:
        plan.nodes.add(kind)
        if kind.startswith(_DEFINING_NODES):
            _collect_target(node["info"], plan)
    elif kind in ("PROJECTION", "AGGREGATE_AND_GROUP_BY") and _only_counts(node):
        plan.row_ids -= 1


def _collect_target(info: dict[str, Any], plan: Plan) -> None:
    qualified = info.get("qualified_name")
    if qualified:
        names = qualified["path"]
    else:
        last = info.get("table") or info.get("view_name") or info.get("name")
        names = info.get("catalog"), info.get("schema"), last
    plan.targets.append(tuple(name for name in names if name))
    # A view is not bound in the plan that creates it.
    query = info.pop("query", None)
    if query:
        plan.views.append(ujson.dumps({"error": False, "statements": [query]}))


def _columns(scan: dict[str, Any]) -> list[int]:
    return [column["index"] for column in scan.get("column_indexes") or ()]


def _only_counts(node: dict[str, Any]) -> bool:
    """Whether ``node`` is over a scan of which it needs no column, only the rows: of their ids."""
    (child,) = node["children"]
    if child.get("type") != "LOGICAL_GET" or _columns(child) != [_ROW_ID]:
        return False
    own = {name: value for name, value in node.items() if name != "children"}
    return "BOUND_REF" not in ujson.dumps(own)


def _function_name(value: dict[str, Any]) -> str:
    # 2.x has qualified names.
    qualified = value.get("qname")
    name = qualified["path"][-1] if isinstance(qualified, dict) else value.get("name")
    return str(name or "").lower()


def _named(info: dict[str, Any]) -> Table:
    qualified = info.get("qualified_name")
    if qualified:
        catalog, schema, name = qualified["path"]
        return catalog, schema, name
    return info["catalog"], info["schema"], info.get("table") or info["name"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a query depends on, as of ``epoch``.

    ``tables`` are the keys of the tables that it reads. ``uncacheable`` says why its result can
    not be kept, ``unwatchable`` why nobody can tell when it changes; empty when it can.
    """

    epoch: int
    tables: tuple[str, ...] = ()
    uncacheable: str = ""
    unwatchable: str = ""


class Readings:
    """What queries read, remembered until the catalog changes. Safe from any thread."""

    def __init__(self, versions: Versions, catalog: str) -> None:
        """``catalog`` is the name of the main database."""
        self._versions = versions
        self._catalog = catalog
        self._memo: dict[str, Reading] = {}
        self._consistent: tuple[int, frozenset[str]] = (-1, frozenset())

    def known(self, sql: str) -> Reading | None:
        """What ``sql`` reads, if that is known already and still true."""
        reading = self._memo.get(sql)
        return reading if reading is not None and reading.epoch == self._versions.epoch else None

    def of(self, native: duckdb.DuckDBPyConnection, sql: str) -> Reading:
        """What ``sql``, one SELECT, reads."""
        reading = self.known(sql)
        if reading is None:
            # Taken first: a change of the catalog while DuckDB plans makes the answer void.
            epoch = self._versions.epoch
            reading = self._read(native, sql, epoch)
            if len(sql) <= _MEMO_TEXT_LENGTH:
                if len(self._memo) >= _MEMO_ENTRIES:
                    self._memo.clear()
                self._memo[sql] = reading
        return reading

    def alone(self, native: duckdb.DuckDBPyConnection, sql: str) -> Reading:
        """What ``sql``, one SELECT, reads on ``native``, where names may mean something else than
        on other cursors. Not remembered."""
        return self._read(native, sql, self._versions.epoch)

    def _read(self, native: duckdb.DuckDBPyConnection, sql: str, epoch: int) -> Reading:
        if len(sql) > MAX_PLANNED_LENGTH:
            reason = f"its text has more than {MAX_PLANNED_LENGTH} characters"
            return Reading(epoch, (), reason, reason)
        try:
            plan = plan_of(native, sql)
        except Unplannable as error:
            reason = f"DuckDB does not tell what it reads: {error}"
            return Reading(epoch, (), reason, reason)
        keys = tuple(sorted({key_of(table) for table in plan.reads}))
        sources = plan.table_functions - _GENERATORS
        if plan.writes:
            unwatchable = "it changes data"
        elif not _SIDE_EFFECTS.isdisjoint(plan.functions):
            unwatchable = f"{min(_SIDE_EFFECTS & plan.functions)}() changes something each time"
        elif sources:
            unwatchable = f"it reads {min(sources)}(), whose changes are not seen"
        elif plan.nodes - {"SAMPLE"}:
            unwatchable = f"its plan has a part that is not known to only read: {min(plan.nodes)}"
        else:
            unwatchable = ""
        foreign = {table[0] for table in plan.reads if table[0].lower() != self._catalog.lower()}
        inconsistent = plan.functions - self._consistent_functions(native, epoch)
        if unwatchable:
            uncacheable = unwatchable
        elif plan.nodes:
            uncacheable = "it takes a sample"
        elif plan.row_ids:
            uncacheable = "it may read rowid, which a checkpoint may change"
        elif foreign:
            uncacheable = f"it reads another database, {min(foreign)}"
        elif inconsistent:
            uncacheable = f"{min(inconsistent)}() may give something else each time"
        else:
            uncacheable = ""
        return Reading(epoch, keys, uncacheable, unwatchable)

    def _consistent_functions(
        self, native: duckdb.DuckDBPyConnection, epoch: int
    ) -> frozenset[str]:
        """Those that give the same for the same arguments. Extensions bring more."""
        known_at, names = self._consistent
        if known_at != epoch:
            rows = native.execute(
                "SELECT lower(function_name) FROM duckdb_functions() WHERE stability IS NOT NULL "
                "GROUP BY 1 HAVING bool_and(stability = 'CONSISTENT')"
            ).fetchall()
            names = frozenset({row[0] for row in rows} - _NOT_CONSISTENT | _CONSISTENT)
            self._consistent = (epoch, names)
        return names
