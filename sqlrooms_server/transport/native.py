"""The native library of socketify: uWebSockets on libuv. The only module that loads it.

Everything here is bound once and lives as long as the process: binding a function parses C
declarations under a lock of cffi, which must not happen in a callback.

What ends the process, so that the callers of this module take care of it: any call on a closed
socket, a call from another thread than the loop's, an HTTP request that is never answered, an
idle timeout out of range, an empty host.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cffi

from sqlrooms_server.errors import StartupError

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


def _load_socketify() -> Any:
    """The module ``socketify.native``, without the rest of socketify.

    The rest replaces asyncio's task factory, which newer Pythons reject, and costs 90 ms.
    """
    preload = os.environ.get(LIBUV_VARIABLE)
    if preload:
        try:
            ctypes.CDLL(preload, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise StartupError(f"{LIBUV_VARIABLE}: cannot load {preload}: {error}.") from error
    package = importlib.util.find_spec("socketify")
    if package is None or package.origin is None:
        raise StartupError("The package socketify is not installed; pip install socketify.")
    path = Path(package.origin).with_name("native.py")
    spec = importlib.util.spec_from_file_location("sqlrooms_server._socketify_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        text = str(error)
        if "libuv" in text.split("cannot load library")[-1].split(":", 1)[-1]:
            raise StartupError(_NO_LIBUV) from error
        raise StartupError(_NO_BUILD.format(reason=text.splitlines()[0])) from error
    return module


_load_standard_library()
_socketify = _load_socketify()
ffi: Any = _socketify.ffi
lib: Any = _socketify.lib

_extra_ffi = cffi.FFI()
_extra_ffi.include(ffi)
_extra_ffi.cdef(
    """
    void us_wakeup_loop(struct us_loop_t *loop);
    struct us_socket_context_t *us_socket_context(int ssl, void *socket);
    void us_socket_context_close(int ssl, struct us_socket_context_t *context);
    void us_loop_free(struct us_loop_t *loop);
    int us_poll_fd(void *poll);
    void us_poll_change(void *poll, void *loop, int events);
    void us_socket_timeout(int ssl, void *socket, unsigned int seconds);
    void uv_walk(void *loop, void (*callback)(void *handle, void *argument), void *argument);
    void uv_close(void *handle, void *callback);
    int uv_is_closing(void *handle);
    """
)
_extra: Any = _extra_ffi.dlopen(_socketify.library_path)

# The first argument of every uWebSockets call: whether its sockets speak TLS.
PLAIN = 0
TLS = 1

TEXT = 1
BINARY = 2
CONTINUATION = 0

# Listen without SO_REUSEPORT, or a second server on the port would share the clients at random.
EXCLUSIVE_PORT = 1
SHARED_PORT = 0

wakeup_loop = _extra.us_wakeup_loop
loop_free = _extra.us_loop_free

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
    _extra.us_poll_change(
        _extra_ffi.cast("void*", res), _extra_ffi.cast("void*", loop), _READABLE_AND_WRITABLE
    )
    limit_silence(tls, res, seconds)


def limit_silence(tls: int, res: Any, seconds: int) -> None:
    """Close the socket of ``res`` after ``seconds``, unless uWebSockets sets another limit by then;
    0 means never."""
    _extra.us_socket_timeout(tls, _extra_ffi.cast("void*", res), seconds)


@ffi.callback(  # type: ignore[untyped-decorator, unused-ignore]
    "void(const char*, size_t, const char*, size_t, void*)"
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


@_extra_ffi.callback("void(void*, void*)")  # type: ignore[untyped-decorator, unused-ignore]
def _close_handle(handle: Any, _: Any) -> None:
    if not _extra.uv_is_closing(handle):
        _extra.uv_close(handle, ffi.NULL)


def destroy_loop(uv: Any, loop: Any) -> None:
    """Free a uWebSockets loop and the libuv loop below it with all handles."""
    native = lib.socketify_get_native_loop(uv)
    loop_free(loop)
    _extra.uv_walk(native, _close_handle, ffi.NULL)
    # Closing a handle takes a turn of the loop, and its callback another one.
    for _ in range(3):
        lib.socketify_loop_run(uv, lib.SOCKETIFY_RUN_NOWAIT)
    lib.socketify_destroy_loop(uv)


def descriptor(socket: Any) -> int:
    """The file descriptor of a socket, one that listens too."""
    return int(_extra.us_poll_fd(_extra_ffi.cast("void*", socket)))


def socket_context(tls: int, listener: Any) -> Any:
    """The context of the HTTP sockets that ``listener`` accepts."""
    return ffi.cast("uws_socket_context_t*", _extra.us_socket_context(tls, listener))


def close_sockets(tls: int, context: Any) -> None:
    """Close every socket of ``context`` at once."""
    pointer = _extra_ffi.cast("struct us_socket_context_t*", context)
    _extra.us_socket_context_close(tls, pointer)


def unpack(pointer: Any, length: int) -> bytes:
    """A copy of ``length`` bytes; the original is gone when the callback returns."""
    return bytes(ffi.unpack(pointer, length)) if length else b""


def pointer_key(pointer: Any) -> int:
    """The address of ``pointer``, to look its owner up."""
    return int(ffi.cast("uintptr_t", pointer))


def integer_pointer(value: int) -> Any:
    """``value`` in the shape of the user data of a callback."""
    return ffi.cast("void*", value)
