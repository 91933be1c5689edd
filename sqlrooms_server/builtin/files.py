"""Files beneath configured directories: list, read, preview, upload, make directories, delete.

A path is the name of a root and what is beneath it, ``data/2024/sales.csv``; that of a directory
ends with ``/`` where patterns of roles and addresses are concerned.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from sqlrooms_server.access.roles import NOBODY, Role
from sqlrooms_server.builtin.beneath import Entry, Root, ServesFiles, names_in
from sqlrooms_server.builtin.serving import answer, attachment, etag
from sqlrooms_server.builtin.uploads import Upload, check_size
from sqlrooms_server.db.previews import Previews
from sqlrooms_server.errors import BadRequest, Conflict, Forbidden, NotFound, StartupError
from sqlrooms_server.plugin import Response, on, route
from sqlrooms_server.plugins.calls import Call
from sqlrooms_server.plugins.http import HttpCall
from sqlrooms_server.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}")
_WRITABLE = ":rw"

_ENTRIES, _MAX_ENTRIES = 1000, 10_000
_ROWS, _MAX_ROWS = 100, 10_000
_MAX_OFFSET = 1 << 53

# Of one message; whole files are downloaded over HTTP.
_READ_BYTES, _MAX_READ_BYTES = 1 << 20, 16 << 20

# Whatever a file is, browsers save it, and run nothing of it in the name of this server.
_HEADERS = {
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}


class Files(ServesFiles):
    """The roots of ``--files``. Raises ``StartupError`` for one that is not right."""

    def __init__(self, settings: Settings) -> None:
        super().__init__("files")
        self._max_size = settings.max_file_size
        self._roots: dict[str, Root] = {}
        self._writable: set[str] = set()
        self._previews = Previews()
        for text in settings.files:
            name, equals, path = text.partition("=")
            if not equals or not _NAME.fullmatch(name) or not path.removesuffix(_WRITABLE):
                raise StartupError(
                    f"--files must be NAME=DIR or NAME=DIR:rw, not {text!r}; names have letters, "
                    "digits, - and _."
                )
            if name in self._roots:
                raise StartupError(f"--files has two directories of the name {name!r}.")
            self._roots[name] = Root(path.removesuffix(_WRITABLE), f"--files {name}")
            if path.endswith(_WRITABLE):
                self._writable.add(name)
        self.roots = list(self._roots.values())
        self.keep_from([settings])

    def stopped(self) -> None:
        self._previews.close()

    # Over the WebSocket.

    @on("files-list")
    def list_files(self, call: Call) -> Any:
        after = call.message.get("after", "")
        if not isinstance(after, str):
            raise BadRequest("after must be a text: the last name of the page before.")
        limit = _number(call.message, "limit", _ENTRIES, 1, _MAX_ENTRIES)
        return self._listing(call.client.role, _path(call, ""), limit, after, quoted=False)

    @on("files-read")
    def read_file(self, call: Call) -> bytes:
        offset = _number(call.message, "offset", 0, 0, _MAX_OFFSET)
        length = _number(call.message, "length", _READ_BYTES, 0, _MAX_READ_BYTES)
        root, names = self._readable(call.client.role, _path(call), quoted=False)
        with root.open(names) as file:
            return file.read(offset, length)

    @on("files-preview")
    def preview_file(self, call: Call) -> Any:
        limit = _number(call.message, "limit", _ROWS, 0, _MAX_ROWS)
        offset = _number(call.message, "offset", 0, 0, _MAX_OFFSET)
        form = call.message.get("format", "arrow")
        if form not in ("arrow", "json"):
            raise BadRequest(f"format must be arrow or json, not {form!r}.")
        root, names = self._readable(call.client.role, _path(call), quoted=False)
        with root.open(names) as file:
            wanted = (file.descriptor, names[-1], limit, offset, call.interrupting)
            if form == "arrow":
                return self._previews.table(*wanted)
            columns, rows = self._previews.json(*wanted)
            return {"columns": columns, "rows": rows.decode()}

    @on("files-mkdir")
    def make_directory(self, call: Call) -> None:
        root, names = self._changeable(call.client.role, _path(call), quoted=False, ends="/")
        root.make_directory(names)

    @on("files-delete")
    def delete_file(self, call: Call) -> None:
        root, names = self._changeable(call.client.role, _path(call), quoted=False)
        root.delete(names)

    # Over HTTP.

    @route("GET", "/files")
    def get_roots(self, call: HttpCall) -> Any:
        return self._listing(_role(call), "", _ENTRIES, "", quoted=True)

    @route("GET", "/files/")
    def get(self, call: HttpCall) -> Any:
        asked, role = call.query, _role(call)
        if not call.rest or call.rest.endswith("/") or "list" in asked:
            limit = _number_of_text(asked, "limit", _ENTRIES, 1, _MAX_ENTRIES)
            return self._listing(role, call.rest, limit, asked.get("after", ""), quoted=True)
        root, names = self._readable(role, call.rest, quoted=True)
        headers = {**_HEADERS, "Content-Disposition": attachment(names[-1])}
        return answer(root.open(names), call.headers, "application/octet-stream", headers)

    @route("PUT", "/files/", streams_body=True)
    async def put(self, call: HttpCall) -> Response:
        if call.rest.endswith("/"):
            raise BadRequest("The path of a file does not end with /.")
        root, names = self._changeable(_role(call), call.rest, quoted=True)
        if not names:
            raise BadRequest("The path needs the name of a file behind that of the root.")
        length = call.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20:
            check_size(int(length), self._max_size)
        replaces = call.headers.get("if-none-match", "").strip() != "*"
        upload = Upload(root, names, self._max_size)
        try:
            await asyncio.to_thread(upload.begin)
            if not upload.is_new and not replaces:
                raise Conflict("There is a file of that name already.")
            async for data in call.chunks:
                await asyncio.to_thread(upload.write, data)
            about = await asyncio.to_thread(upload.finish, replaces=replaces)
        finally:
            # Also when this is cancelled while it waits, or a second time.
            loop = asyncio.get_running_loop()
            await asyncio.shield(loop.run_in_executor(None, upload.abandon))
        found = _described(Entry(names[-1], False, upload.size, about.st_mtime_ns))
        tag = etag(upload.size, about.st_mtime_ns)
        return Response(found, 201 if upload.is_new else 200, headers={"ETag": tag})

    @route("POST", "/files/")
    def post(self, call: HttpCall) -> Response:
        if "mkdir" not in call.query:
            raise BadRequest("POST makes directories, with ?mkdir; files are sent with PUT.")
        root, names = self._changeable(_role(call), call.rest, quoted=True, ends="/")
        root.make_directory(names)
        return Response(status=201)

    @route("DELETE", "/files/")
    def delete(self, call: HttpCall) -> Response:
        root, names = self._changeable(_role(call), call.rest, quoted=True)
        root.delete(names)
        return Response(status=204)

    def _listing(
        self, role: Role, path: str, limit: int, after: str, *, quoted: bool
    ) -> dict[str, Any]:
        names = names_in(path, quoted=quoted)
        if not names:
            roots = [name for name in self._roots if f"{name}/" in role.read_files]
            return {
                "entries": [
                    {"name": name, "kind": "root", "writable": name in self._writable}
                    for name in sorted(roots)
                ],
                "next": None,
            }
        place = "/".join(names) + "/"
        root = self._root(role, place, names)

        def shows(name: str, is_directory: bool) -> bool:
            return place + name + "/" * is_directory in role.read_files

        entries = root.entries(names[1:], limit + 1, after, shows)
        has_more = len(entries) > limit
        entries = entries[:limit]
        return {
            "entries": [_described(entry) for entry in entries],
            "next": entries[-1].name if has_more else None,
        }

    def _readable(self, role: Role, path: str, *, quoted: bool) -> tuple[Root, tuple[str, ...]]:
        names = names_in(path, quoted=quoted)
        return self._root(role, "/".join(names), names), names[1:]

    def _root(self, role: Role, place: str, names: tuple[str, ...]) -> Root:
        if place not in role.read_files:
            raise Forbidden(f"The role {role.name!r} may not read {place!r} (read_files).")
        return self._named(names)

    def _changeable(
        self, role: Role, path: str, *, quoted: bool, ends: str = ""
    ) -> tuple[Root, tuple[str, ...]]:
        names = names_in(path, quoted=quoted)
        place = "/".join(names) + ends
        if place not in role.write_files:
            raise Forbidden(f"The role {role.name!r} may not change {place!r} (write_files).")
        root = self._named(names)
        if names[0] not in self._writable:
            raise Forbidden(
                f"{names[0]!r} is for reading; --files {names[0]}=DIR:rw would let it be changed."
            )
        return root, names[1:]

    def _named(self, names: tuple[str, ...]) -> Root:
        root = self._roots.get(names[0]) if names else None
        if root is None:
            known = ", ".join(self._roots)
            raise NotFound(f"A path begins with the name of a root, one of {known}.")
        return root


def _role(call: HttpCall) -> Role:
    return NOBODY if call.identity is None else call.identity.role


def _path(call: Call, default: str | None = None) -> str:
    path = call.message.get("path", default)
    if not isinstance(path, str):
        raise BadRequest("path must be a text: the name of a root and what is beneath it.")
    return path


def _number(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    return value


def _number_of_text(fields: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = fields.get(name)
    value: Any = int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else text
    return _number({} if text is None else {name: value}, name, default, low, high)


def _described(entry: Entry) -> dict[str, Any]:
    """An entry as clients see it; times are milliseconds since 1970."""
    kind = "directory" if entry.is_directory else "file"
    modified = entry.modified // 10**6
    return {"name": entry.name, "kind": kind, "size": entry.size, "modified": modified}
