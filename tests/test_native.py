"""What the transport declares of the native library, beside what socketify declares."""

from __future__ import annotations

import re
from typing import Any

import cffi
import pytest

from sqlrooms_server.transport import native
from tests import native_types

# Of uSockets and libuv: socketify does not declare them.
NOT_SOCKETIFYS = {
    *("us_loop_free", "us_wakeup_loop", "us_socket_context", "us_socket_context_close"),
    *("us_socket_timeout", "us_poll_fd", "us_poll_change", "uv_walk", "uv_close", "uv_is_closing"),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    # Its declarations only: importing it would change asyncio.
    path = native._library_path().with_name("native.py")
    ffi = cffi.FFI()
    ffi.cdef(path.read_text(encoding="utf-8").split('"""')[1])
    return ffi


def test_the_types_are_made_of_the_declarations() -> None:
    made = native_types.MODULE.read_text(encoding="utf-8")
    assert made == native_types.made(), "python -m tests.native_types renews it"


def test_functions_are_declared_as_socketify_does(theirs: Any) -> None:
    known = theirs.dlopen(str(native._library_path()))
    text = native_types.DECLARATIONS.read_text(encoding="utf-8")
    names = set(re.findall(r"\b((?:us|uv|uws|socketify)_\w+)\(", text))
    assert len(names) > 50
    assert names >= NOT_SOCKETIFYS
    for name in names - NOT_SOCKETIFYS:
        mine = shape(native.ffi, native.ffi.typeof(getattr(native.lib, name)))
        assert mine == shape(theirs, theirs.typeof(getattr(known, name))), name


def shape(ffi: Any, type_: Any) -> Any:
    """What of ``type_`` the machine sees; all enumerations are integers."""
    if type_.kind in ("struct", "function"):
        if type_.kind == "function":
            return [shape(ffi, of) for of in (*type_.args, type_.result)]
        fields = [(name, of.offset, shape(ffi, of.type)) for name, of in type_.fields or ()]
        return [*fields, ffi.sizeof(type_)]
    if type_.kind == "pointer" and type_.item.kind == "function":
        return shape(ffi, type_.item)
    if type_.kind in ("pointer", "void"):
        return type_.kind
    assert type_.kind in ("primitive", "enum")
    return ffi.sizeof(type_)
