"""One check of one text against a policy.

In three steps, each before DuckDB does more with the text: by its words, before it is parsed and
planned, which alone may open files; by the kinds of its statements; by the plan of each. A plan
holds every function, table and step of a statement, also those behind views and macros, and what
is not on a list of what is known to be harmless is refused.
"""

from __future__ import annotations

from typing import NoReturn

import duckdb

from sqlrooms_server.db import words
from sqlrooms_server.db.effects import has_changing_word
from sqlrooms_server.db.functions import CHANGING, FILE_READERS, GENERATORS, METADATA, is_harmless
from sqlrooms_server.db.plans import MAX_PLANNED_LENGTH, Plan, Unplannable, plan_of
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.db.reach import Reach, listed
from sqlrooms_server.db.statements import Classifier, Statements, quote_identifier
from sqlrooms_server.db.untyped import without_parameters
from sqlrooms_server.db.words import Token
from sqlrooms_server.errors import QueryError

# Each takes DuckDB 25 ms to find.
_MAX_MACROS = 100

_PIVOTS = frozenset("pivot pivot_wider pivot_longer unpivot".split())
_QUERIES = frozenset("select from with values table".split()) | _PIVOTS
_DESCRIPTIONS = frozenset("describe desc show summarize".split())
_READING = (
    _QUERIES
    | _DESCRIPTIONS
    | frozenset("explain pragma begin start commit end rollback abort set reset use".split())
)
_WRITING = frozenset(
    "insert update delete truncate merge create drop alter comment vacuum analyze analyse".split()
)
# They hide a statement from those who look at kinds; IMPORT is read when it is parsed.
_HIDING = frozenset("prepare execute deallocate import".split())
_EXTENDING = frozenset("install load force".split())

_READING_PRAGMAS = frozenset(
    "table_info show show_tables show_tables_expanded show_databases version platform "
    "collations".split()
)
_DEFINED = frozenset("table view macro function sequence type index schema".split())
_MODIFIERS = frozenset(
    "or replace temp temporary local global persistent unlogged unique recursive if not "
    "exists".split()
)

_INSTEAD = {
    "copy": "ask for the rows with a query, and send data with uploadArrow",
    "import": "send data with uploadArrow",
    "export": "ask for the rows of each table with a query",
    "prepare": "send values as params of a query",
    "execute": "send the statement itself, with params",
    "install": "the operator can load extensions with --extensions",
    "load": "the operator can load extensions with --extensions",
    "set": "only SET VARIABLE and USE are open",
    "reset": "only RESET VARIABLE is open",
    "call": "use SELECT * FROM the function, if that is open",
    "checkpoint": "the server checkpoints by itself",
}

# Statements that are looked at in a way of their own, and what DuckDB calls them.
_KINDS_BY_WORD = {
    "pragma": ("PRAGMA", "SELECT"),
    "use": ("SET",),
    **dict.fromkeys(_DESCRIPTIONS, ("SELECT",)),
}

_EXPLAIN_OPTIONS = frozenset("analyze analyse format verbose".split())

_PLAIN_NODES = frozenset({"SAMPLE", "TRANSACTION", "SET", "RESET", "VACUUM"})
_WRITING_NODES = ("CREATE_", "DROP", "ALTER", "VACUUM")


class Check:
    """One check of one text. ``reserved``: the keywords that can be no names of functions."""

    def __init__(
        self,
        reach: Reach,
        classifier: Classifier,
        reserved: frozenset[str],
        native: duckdb.DuckDBPyConnection,
        policy: Policy,
    ) -> None:
        self._reach = reach
        self._classifier = classifier
        self._reserved = reserved
        self._native = native
        self._policy = policy
        # Macros that were looked into, and what they are defined as.
        self._macros: set[str] = set()
        self._definitions: list[str] = []
        # Otherwise only kinds and extensions matter.
        self._is_closed = policy.is_inside or policy.read_only
        self._reads_files = not policy.is_inside or (
            bool(reach.directories) and policy.schemas is None
        )

    def text(self, sql: str) -> Statements:
        if len(sql) > MAX_PLANNED_LENGTH:
            self._refuse(
                f"A text of {len(sql)} characters",
                f"at most {MAX_PLANNED_LENGTH} can be checked; send data with uploadArrow, or as "
                "params",
            )
        tokens = self._tokens(sql)
        statements = self._classifier.classify(self._native, sql)
        if statements.kinds is None:
            self._unparsed(sql)
        if statements.is_several:
            # Step 3, and of step 1 what takes the catalog, come when those before it have run.
            for kind, text in zip(statements.kinds, statements.texts, strict=True):
                self._kind(_kind_of(kind, next(words.openings(self._tokens(text)), [""])))
        elif statements.kinds:
            if len(list(words.openings(tokens))) > 1:
                self._refuse("This text", "one of its statements must be sent alone to be checked")
            if self._is_closed:
                self._calls(tokens)
                self._file_names(tokens)
            self._statement(statements.kinds, sql, tokens)
        return statements

    def _refuse(self, what: str, why: str) -> NoReturn:
        self._policy.refuse(what, why)

    # Step 1: words.

    def _tokens(self, sql: str, *, is_statement: bool = True) -> list[Token]:
        try:
            tokens = words.tokens_of(sql)
        except words.Unreadable as error:
            self._refuse("This text", str(error))
        for opening in words.openings(tokens) if is_statement else ():
            self._opening(opening)
        # What follows asks for the first words by their places.
        first = next((i for i, token in enumerate(tokens) if not token.is_sign(";")), 0)
        return tokens[first:]

    def _opening(self, opening: list[str]) -> None:
        policy, word = self._policy, opening[0]
        if word in _HIDING:
            self._refuse(word.upper(), _INSTEAD.get(word, "what it does cannot be told"))
        if not policy.extensions:
            if word in _EXTENDING or opening[:2] == ["update", "extensions"]:
                self._refuse(word.upper(), _INSTEAD["load"])
            if word in ("set", "reset", "pragma") and any("extension" in w for w in opening):
                self._refuse(word.upper(), "extensions are not open")
        if not self._is_closed:
            return
        if word in _WRITING:
            if policy.read_only:
                self._refuse(word.upper(), "nothing may be changed")
            if word in ("create", "drop", "alter"):
                self._definition(opening)
        elif word not in _READING:
            self._refuse(word.upper(), _INSTEAD.get(word, "it is not known to stay inside"))
        if word in ("set", "reset") and opening[1:2] != ["variable"]:
            self._refuse(" ".join(opening[:2]).upper(), _INSTEAD[word])
        if word == "pragma" and (
            not _READING_PRAGMAS.issuperset(opening[1:2] or [""])
            or "=" in opening
            or policy.schemas is not None
        ):
            self._refuse(" ".join(opening[:2]).upper(), "it is not among those that are open")

    def _definition(self, opening: list[str]) -> None:
        word, *rest = opening
        kind = next((word for word in rest if word not in _MODIFIERS), "")
        if kind not in _DEFINED:
            self._refuse(f"{word} {kind}".upper(), f"only a {listed(_DEFINED)} can be meant")
        if self._policy.schemas is not None and kind in ("macro", "function") and word == "create":
            self._refuse(
                "CREATE MACRO", "what a macro reads cannot be checked before it is used; try a view"
            )

    def _calls(self, tokens: list[Token]) -> None:
        for name, bracket in words.calls(tokens):
            if bracket > 1 and tokens[bracket - 2].text == "pragma":
                continue
            if not self._may_call(name):
                is_reader = name in FILE_READERS
                why = (
                    "files are closed"
                    if is_reader
                    else "it is not among the functions that are open"
                )
                self._refuse(f"{name}()", why)
            if name in FILE_READERS and self._policy.is_inside:
                paths = words.literal_paths(tokens, bracket)
                if paths is None:
                    self._refuse(f"{name}()", "what it reads must be a text, or a list of texts")
                for path in paths:
                    self._path(path)
        for name in words.keyword_calls(tokens) - self._reserved:
            if name not in self._macros:
                self._is_harmless_macro(name)
        if words.has_inner_description(tokens):
            self._refuse("DESCRIBE in a statement", "it can be checked alone only")

    def _may_call(self, name: str) -> bool:
        if is_harmless(name) or name in GENERATORS or self._reach.has_function(name):
            return True
        if name in CHANGING:
            return not self._policy.read_only
        if name in METADATA:
            return self._policy.schemas is None
        if name in FILE_READERS:
            return self._reads_files
        # It was, or is being, looked into.
        return name in self._macros or self._is_harmless_macro(name)

    def _is_harmless_macro(self, name: str) -> bool:
        """Whether ``name`` is a macro. Raises ``Forbidden`` when it does what must not be."""
        self._macros.add(name)
        if len(self._macros) > _MAX_MACROS:
            self._refuse("This statement", f"it calls more than {_MAX_MACROS} macros")
        # What a macro does is in the plan of its call, but a plan may open a file that the client
        # has named.
        found = self._native.execute(
            "SELECT macro_definition FROM duckdb_functions() WHERE lower(function_name) = ? "
            "AND function_type IN ('macro', 'table_macro') AND NOT internal",
            [name],
        ).fetchall()
        for (definition,) in found:
            self._definitions.append(definition)
            tokens = self._tokens(definition, is_statement=False)
            self._calls(tokens)
            self._file_names(tokens)
        return bool(found)

    def _file_names(self, tokens: list[Token]) -> None:
        if not self._policy.is_inside:
            return
        for name in words.file_names(tokens):
            path = words.plain_text(name) if name.startswith("'") else name
            if not self._reads_files or path is None:
                self._refuse(f"FROM {name}", "it may name a file, and files are closed")
            self._path(path)

    def _path(self, path: str) -> None:
        if path not in self._reach.directories:
            self._refuse(repr(path), f"files can be read in {self._reach.directories}")

    def _inner(self, sql: str) -> None:
        """Check a text inside of the text."""
        Check(self._reach, self._classifier, self._reserved, self._native, self._policy).text(sql)

    # Step 2: kinds.

    def _kind(self, kind: str) -> None:
        kinds = self._policy.kinds
        if kinds is not None and kind not in kinds:
            self._refuse(f"A statement of kind {kind}", f"allowed kinds are {listed(kinds)}")

    def _inner_kinds(self, sql: str) -> None:
        """A SELECT of 2.x may insert in a WITH."""
        if self._policy.kinds is None:
            return
        try:
            changes = bool(plan_of(self._native, sql).writes)
        except Unplannable:
            changes = has_changing_word(sql)
        if changes:
            for kind in ("INSERT", "UPDATE", "DELETE", "MERGE_INTO"):
                self._kind(kind)

    def _unparsed(self, sql: str) -> NoReturn:
        try:
            self._native.extract_statements(sql)
        except duckdb.Error as error:
            raise QueryError(str(error)) from error
        except ValueError:
            pass
        self._refuse("This text", "DuckDB does not tell what it is")

    # Step 3: plans.

    def _statement(self, kinds: tuple[str, ...], sql: str, tokens: list[Token]) -> None:
        opening = next(words.openings(tokens))
        # One statement that is several for DuckDB: PIVOT, or a new column with a default.
        is_several = len(kinds) > 1 or kinds == ("MULTI",)
        kind = _kind_of("MULTI" if is_several else kinds[0], opening)
        self._kind(kind)
        if not is_several and kinds[0] not in _KINDS_BY_WORD.get(opening[0], kinds):
            self._refuse("This text", "DuckDB takes it for something else than its first word says")
        if kind == "SELECT":
            self._inner_kinds(sql)
        if kind == "EXPLAIN":
            self._explained(sql, tokens)
        elif not self._is_closed or kind in ("TRANSACTION", "PRAGMA"):
            return
        elif is_several:
            self._several(opening, sql, tokens)
        elif opening[0] in ("describe", "desc", "show"):
            self._described(opening, sql, tokens)
        elif opening[0] == "use":
            self._used(sql, tokens)
        else:
            self._planned(sql)

    def _explained(self, sql: str, tokens: list[Token]) -> None:
        i = 2 if tokens[1].text in ("analyze", "analyse") else 1
        if tokens[i].is_sign("(") and tokens[i + 1].text in _EXPLAIN_OPTIONS:
            while not tokens[i].is_sign(")"):
                i += 1
            i += 1
        self._inner(_rest(sql, tokens, i))

    def _described(self, opening: list[str], sql: str, tokens: list[Token]) -> None:
        """The plan of a description does not tell what it describes."""
        following = tokens[1:2]
        names = [token.text for token in tokens[1:] if token.kind != "quoted"]
        if opening[0] == "show" and names == ["databases"]:
            return
        if not following or (opening[0] == "show" and names[:2] in (["tables"], ["all", "tables"])):
            self._planned(sql)
        elif following[0].is_sign("(") or following[0].text in _QUERIES | _DESCRIPTIONS:
            self._inner(_rest(sql, tokens, 1))
        else:
            self._planned(f"FROM {_rest(sql, tokens, 1)}")

    def _used(self, sql: str, tokens: list[Token]) -> None:
        self._planned(sql)
        if self._is_outside(tokens[1].text):
            self._refuse(f"USE {tokens[1].text}", "it is another database")

    def _is_outside(self, name: str) -> bool:
        """Whether ``name`` is a database that is out of bounds."""
        if not self._policy.is_inside or name in self._reach.catalogs:
            return False
        found = self._native.execute(
            "SELECT 1 FROM duckdb_databases() WHERE lower(database_name) = ?", [name]
        ).fetchall()
        return bool(found)

    def _several(self, opening: list[str], sql: str, tokens: list[Token]) -> None:
        if opening[0] == "alter" and not self._policy.read_only:
            # ALTER TABLE name ADD COLUMN column type DEFAULT …: its plan without what follows.
            for i, token in enumerate(tokens):
                if token.kind == "keyword" and token.text in ("default", "not", "check", "unique"):
                    self._plain_calls(tokens[i:])
                    return self._planned(_until(sql, tokens, i))
        place = _place_of_on(tokens)
        following = {token.text for token in tokens[place:] if token.kind == "keyword"}
        if opening[0] in _PIVOTS and place > 1 and not following & _QUERIES:
            self._plain_calls(tokens[place:])
            source = sql.encode()[tokens[1].start : tokens[place].start].decode()
            return self._planned(f"FROM {source}")
        self._refuse(
            "This statement",
            "DuckDB carries it out as several, which cannot be checked; a pivot can be written "
            "PIVOT name ON …, or FROM … PIVOT (… FOR … IN (…))",
        )

    def _plain_calls(self, tokens: list[Token]) -> None:
        """Of what is not planned, and names no tables: it must not call a macro that does."""
        for name, _ in words.calls(tokens):
            if not is_harmless(name) and (name not in CHANGING or self._policy.schemas is not None):
                self._refuse(f"{name}() in this place", "what it does cannot be checked there")
        for name in words.keyword_calls(tokens) - self._reserved:
            if self._is_harmless_macro(name):
                self._refuse(f"{name}() in this place", "what it does cannot be checked there")

    def _planned(self, sql: str) -> None:
        plan: Plan | None
        try:
            plan = plan_of(self._native, sql)
        except Unplannable as error:
            plan = self._planned_otherwise(sql, error)
        if plan is not None:
            self._plan(plan)

    def _planned_otherwise(self, sql: str, error: Unplannable) -> Plan | None:
        """Another plan; None when it need not be known. Raises ``Forbidden``."""
        if error.kind == "internal":
            without = without_parameters(self._native, sql)
            if without is not None:
                try:
                    return plan_of(self._native, without)
                except Unplannable as second:
                    error = second
        reason = str(error)
        if error.kind == "not implemented" or reason.endswith("does not support serialization"):
            # DuckDB writes no plan of what reads files. Words have told all that is called.
            if self._reads_files and not (self._policy.read_only and has_changing_word(sql)):
                self._tables_alone(sql)
                return None
            self._refuse("This statement", f"DuckDB does not tell what it does: {reason}")
        if error.kind in ("internal", "invalid input", "invalid"):
            self._refuse("This statement", f"its plan cannot be checked: {reason}")
        if self._policy.schemas is not None:
            # What follows proposes names that may be out of bounds.
            reason = reason.splitlines()[0]
        prefix = f"{error.kind.title()} Error: " if error.kind else ""
        raise QueryError(prefix + reason)

    def _tables_alone(self, sql: str) -> None:
        """Of a statement that reads files: what it reads besides. A view may hide anything."""
        texts = [sql, *self._definitions]
        names = {
            ".".join(quote_identifier(part.text) for part in parts)
            for text in texts
            for parts in words.table_names(self._tokens(text, is_statement=False))
            if parts[0].kind != "string"
        }
        for name in sorted(names):
            try:
                plan = plan_of(self._native, f"FROM {name}")
            except Unplannable:
                # A name of the statement itself, or another view of files.
                continue
            self._plan(plan)

    def _plan(self, plan: Plan) -> None:
        policy, reach = self._policy, self._reach
        for name in sorted(plan.functions):
            is_open = is_harmless(name) or reach.has_function(name)
            if not is_open and not (name in CHANGING and not policy.read_only):
                self._refuse(f"{name}()", "it is not among the functions that are open")
        for name in sorted(plan.calls):
            if not self._may_call(name):
                self._refuse(f"{name}()", "it is not among the functions that are open")
        for name in sorted(plan.table_functions):
            is_open = name in GENERATORS or reach.has_function(name)
            is_open = is_open or (name in METADATA and policy.schemas is None)
            if not is_open and not (name in FILE_READERS and self._reads_files):
                self._refuse(f"{name}()", "it is not among the table functions that are open")
        for table in plan.reads:
            reach.check_table(table, policy, "Reading")
        for table in plan.sequences:
            reach.check_table(table, policy, "The sequence")
        for table in plan.writes:
            reach.check_table(table, policy, "Changing")
        if policy.read_only and plan.writes:
            self._refuse("Changing " + ".".join(plan.writes[0]), "nothing may be changed")
        for node in sorted(plan.nodes):
            writes = node.startswith(_WRITING_NODES)
            if (node not in _PLAIN_NODES and not writes) or (writes and policy.read_only):
                self._refuse(f"A statement with {node}", "it is not known to be harmless")
        for target in plan.targets:
            self._target(target)
        for view in plan.views:
            sql = self._native.execute("SELECT json_deserialize_sql(?)", [view]).fetchall()[0][0]
            self._planned(sql)

    def _target(self, target: tuple[str, ...]) -> None:
        first = target[0].lower()
        if self._reach.is_fixed(target):
            self._refuse("Changing " + ".".join(target), "it is of the server")
        if len(target) > 2 or first in self._reach.catalogs:
            self._reach.check_table(target, self._policy, "Changing")
        elif self._is_outside(first):
            self._refuse("Changing " + ".".join(target), "it is in another database")
        elif self._policy.schemas is not None and first not in self._policy.schemas:
            # A schema, or something that is not there.
            self._refuse(
                "Changing " + ".".join(target),
                f"open are the schemas {listed(self._policy.schemas)}; write schema.name",
            )


def _kind_of(kind: str, opening: list[str]) -> str:
    """The kind that a policy lists. The versions of DuckDB do not agree about some."""
    if opening[0] == "pragma":
        return "PRAGMA"
    if kind == "MULTI":
        return "SELECT" if opening[0] in _QUERIES else opening[0].upper()
    return kind


def _place_of_on(tokens: list[Token]) -> int:
    """Where the first ON stands outside of brackets; 0 when there is none."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += token.is_sign("(") - token.is_sign(")")
        if not depth and token.kind == "keyword" and token.text == "on":
            return i
    return 0


def _rest(sql: str, tokens: list[Token], i: int) -> str:
    return sql.encode()[tokens[i].start :].decode() if i < len(tokens) else ""


def _until(sql: str, tokens: list[Token], i: int) -> str:
    return sql.encode()[: tokens[i].start].decode()
