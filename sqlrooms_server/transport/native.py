"""The native library of socketify: uWebSockets on libuv. The only module that loads it.

Everything here is bound once and lives as long as the process. What it declares is in ``native.h``,
of which ``native_types`` is made: parsing that would take a sixth of the start of a server.

What ends the process, so that the callers of this module take care of it: any call on a closed
socket, a call from another thread than the loop's, an HTTP request that is never answered, an
idle timeout out of range, an empty host.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlrooms_server.errors import StartupError
from sqlrooms_server.transport import native_types

LIBUV_VARIABLE = "SQLROOMS_LIBUV"

_NO_LIBUV = (
    "The WebSocket library needs libuv (libuv.so.1), which is not installed. "
    "Debian and Ubuntu: apt-get install libuv1 (libuv1t64 from 24.04 on); Fedora: dnf install "
    f"libuv; conda: conda install libuv. Or point {LIBUV_VARIABLE} at the file."
)
_NO_BUILD = (
    "The WebSocket library has no build for this platform ({reason}). There are builds for "
    "Linux x86-64 with glibc, macOS and Windows x86-64."
)


def _load_standard_library() -> None:
    """Load the C++ library of the system before socketify, which brings an old one inside.

    The loader unifies some of their symbols, the first one wins, and with socketify's locale
    everything else in the process that uses a regular expression in C++ (Arrow, for time
    zones) crashes.
    """
    with contextlib.suppress(OSError):
        ctypes.CDLL("libstdc++.so.6", ctypes.RTLD_GLOBAL)


def _library_path() -> Path:
    """The library inside socketify, which is not imported itself.

    That replaces asyncio's task factory, which newer Pythons reject, and costs 150 ms.
    """
    package = importlib.util.find_spec("socketify")
    if package is None or package.origin is None:
        raise StartupError("The package socketify is not installed; pip install socketify.")
    system = platform.system().lower()
    machine = "arm64" if "arm" in platform.machine().lower() else "amd64"
    extension = "dll" if system == "windows" else "so"
    return Path(package.origin).with_name(f"libsocketify_{system}_{machine}.{extension}")


def _load_library() -> Any:
    preload = os.environ.get(LIBUV_VARIABLE)
    if preload:
        try:
            ctypes.CDLL(preload, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise StartupError(f"{LIBUV_VARIABLE}: cannot load {preload}: {error}.") from error
    path = _library_path()
    try:
        return ffi.dlopen(str(path))
    except OSError as error:
        text = str(error)
        if "libuv" in text.split("cannot load library")[-1].split(":", 1)[-1]:
            raise StartupError(_NO_LIBUV) from error
        raise StartupError(_NO_BUILD.format(reason=text.splitlines()[0])) from error


_load_standard_library()
ffi: Any = native_types.ffi
lib: Any = _load_library()

# The first argument of every uWebSockets call: whether its sockets speak TLS.
PLAIN = 0
TLS = 1

TEXT = 1
BINARY = 2
CONTINUATION = 0

# Listen without SO_REUSEPORT, or a second server on the port would share the clients at random.
EXCLUSIVE_PORT = 1
SHARED_PORT = 0

wakeup_loop = lib.us_wakeup_loop
loop_free = lib.us_loop_free

ws_send = lib.uws_ws_send_with_options
ws_end = lib.uws_ws_end
ws_close = lib.uws_ws_close
ws_buffered = lib.uws_ws_get_buffered_amount
ws_subscribe = lib.uws_ws_subscribe
ws_unsubscribe = lib.uws_ws_unsubscribe
publish = lib.uws_publish
ws_user_data = lib.uws_ws_get_user_data

pause_reading = lib.uws_res_pause

_READABLE_AND_WRITABLE = 3


@ffi.callback("void(void*)")  # type: ignore[untyped-decorator, unused-ignore]
def _call_handle(handle: Any) -> None:
    ffi.from_handle(handle)()


def corked(tls: int, ws: Any, write: Callable[[], None]) -> None:
    """Hand what ``write`` sends on ``ws`` to the kernel in one call."""
    lib.uws_ws_cork(tls, ws, _call_handle, ffi.new_handle(write))


@ffi.callback("void(uws_res_t*, void*)")  # type: ignore[untyped-decorator, unused-ignore]
def _call_handle_of_response(res: Any, handle: Any) -> None:
    ffi.from_handle(handle)()


def corked_response(tls: int, res: Any, write: Callable[[], None]) -> None:
    """The same for an HTTP response."""
    lib.uws_res_cork(tls, res, _call_handle_of_response, ffi.new_handle(write))


def resume_reading(tls: int, res: Any, loop: Any, seconds: int) -> None:
    """Undo ``pause_reading``: ``uws_res_resume`` of the library pauses once more.

    ``seconds`` as for :func:`limit_silence`.
    """
    lib.us_poll_change(ffi.cast("void*", res), ffi.cast("void*", loop), _READABLE_AND_WRITABLE)
    limit_silence(tls, res, seconds)


def limit_silence(tls: int, res: Any, seconds: int) -> None:
    """Close the socket of ``res`` after ``seconds``, unless uWebSockets sets another limit by then;
    0 means never."""
    lib.us_socket_timeout(tls, ffi.cast("void*", res), seconds)


# "char const*": cffi's own parser of types does not take "const" right after a bracket.
@ffi.callback(  # type: ignore[untyped-decorator, unused-ignore]
    "void(char const*, size_t, char const*, size_t, void*)"
)
def _add_header(name: Any, name_length: int, value: Any, value_length: int, handle: Any) -> None:
    pair = (
        unpack(name, name_length).decode("latin-1"),
        unpack(value, value_length).decode("latin-1"),
    )
    ffi.from_handle(handle).append(pair)


def request_headers(req: Any) -> list[tuple[str, str]]:
    """All headers of a request, repeated ones too; the names in lower case."""
    found: list[tuple[str, str]] = []
    lib.uws_req_for_each_header(req, _add_header, ffi.new_handle(found))
    return found


@ffi.callback("void(void*, void*)")  # type: ignore[untyped-decorator, unused-ignore]
def _close_handle(handle: Any, _: Any) -> None:
    if not lib.uv_is_closing(handle):
        lib.uv_close(handle, ffi.NULL)


def destroy_loop(uv: Any, loop: Any) -> None:
    """Free a uWebSockets loop and the libuv loop below it with all handles."""
    native = lib.socketify_get_native_loop(uv)
    loop_free(loop)
    lib.uv_walk(native, _close_handle, ffi.NULL)
    # Closing a handle takes a turn of the loop, and its callback another one.
    for _ in range(3):
        lib.socketify_loop_run(uv, lib.SOCKETIFY_RUN_NOWAIT)
    lib.socketify_destroy_loop(uv)


def descriptor(socket: Any) -> int:
    """The file descriptor of a socket, one that listens too."""
    return int(lib.us_poll_fd(ffi.cast("void*", socket)))


def socket_context(tls: int, listener: Any) -> Any:
    """The context of the HTTP sockets that ``listener`` accepts."""
    return ffi.cast("uws_socket_context_t*", lib.us_socket_context(tls, listener))


def close_sockets(tls: int, context: Any) -> None:
    """Close every socket of ``context`` at once."""
    pointer = ffi.cast("struct us_socket_context_t*", context)
    lib.us_socket_context_close(tls, pointer)


def unpack(pointer: Any, length: int) -> bytes:
    """A copy of ``length`` bytes; the original is gone when the callback returns."""
    return bytes(ffi.unpack(pointer, length)) if length else b""


def pointer_key(pointer: Any) -> int:
    """The address of ``pointer``, to look its owner up."""
    return int(ffi.cast("uintptr_t", pointer))


def integer_pointer(value: int) -> Any:
    """``value`` in the shape of the user data of a callback."""
    return ffi.cast("void*", value)
