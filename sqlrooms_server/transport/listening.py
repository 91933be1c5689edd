"""The sockets that listen, and the contexts of those that they accept. For the loop thread."""

from __future__ import annotations

import os
from typing import Any

from sqlrooms_server.errors import StartupError
from sqlrooms_server.transport import addresses, native
from sqlrooms_server.transport.unix_sockets import UnixSocket

ffi, lib = native.ffi, native.lib


class Listeners:
    """Those of one app of uWebSockets."""

    def __init__(self, tls: int, app: Any) -> None:
        self._tls = tls
        self._app = app
        self._listening: list[Any] = []
        self._contexts: list[Any] = []
        self._callbacks: list[Any] = []
        self._unix_sockets: list[UnixSocket] = []

    def listen(self, address: str, port: int) -> int:
        """Listen there and return the port. Raises ``StartupError``."""
        listener = self._try(address, port, native.EXCLUSIVE_PORT)
        if listener is None and addresses.only_closed_connections(address, port):
            listener = self._try(address, port, native.SHARED_PORT)
        if listener is None:
            raise StartupError(addresses.why_not(address, port))
        addresses.let_others_follow(native.descriptor(listener))
        self._listening.append(listener)
        self.add_context(native.socket_context(self._tls, listener))
        return int(lib.us_socket_local_port(self._tls, listener))

    def listen_on(self, unix_socket: UnixSocket) -> None:
        """Listen on a Unix socket. Raises ``StartupError``."""
        unix_socket.make_room()
        listeners: list[Any] = []

        def on_listen(listener: Any, path: Any, size: int, options: int, user_data: Any) -> None:
            if listener != ffi.NULL:
                listeners.append(listener)

        signature = "void(struct us_listen_socket_t*, const char*, size_t, int, void*)"
        callback = ffi.callback(signature, on_listen)
        self._callbacks.append(callback)
        path = os.fsencode(unix_socket.path)
        lib.uws_app_listen_domain_with_options(
            *(self._tls, self._app, path, len(path), 0, callback, ffi.NULL)
        )
        if not listeners:
            raise StartupError(f"Cannot listen on --unix-socket {unix_socket.path}.")
        unix_socket.made()
        self._unix_sockets.append(unix_socket)
        self._listening += listeners
        self.add_context(native.socket_context(self._tls, listeners[0]))

    def add_context(self, context: Any) -> None:
        """Remember a context whose sockets are to be closed at the end."""
        if context not in self._contexts:
            self._contexts.append(context)

    def close(self) -> None:
        """Accept no more; what is open stays."""
        listening, self._listening = self._listening, []
        for unix_socket in self._unix_sockets:
            unix_socket.remove()
        for listener in listening:
            lib.us_listen_socket_close(self._tls, listener)

    def close_sockets(self) -> None:
        """Close what was accepted."""
        for context in self._contexts:
            native.close_sockets(self._tls, context)

    def _try(self, address: str, port: int, options: int) -> Any:
        """The listening socket; None when the port is taken."""
        listeners: list[Any] = []

        def on_listen(listener: Any, config: Any, user_data: Any) -> None:
            if listener != ffi.NULL:
                listeners.append(listener)

        signature = "void(struct us_listen_socket_t*, uws_app_listen_config_t, void*)"
        # Lives on: it may be called once more.
        callback = ffi.callback(signature, on_listen)
        self._callbacks.append(callback)
        config = ffi.new("uws_app_listen_config_t*")
        host = ffi.new("char[]", address.encode())
        config.port, config.host, config.options = port, host, options
        lib.uws_app_listen_with_config(self._tls, self._app, config[0], callback, ffi.NULL)
        return listeners[0] if listeners else None
