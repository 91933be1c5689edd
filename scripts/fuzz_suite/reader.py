"""A process that asks a server for more than it will ever read: ``python -m fuzz_suite.reader``."""

from __future__ import annotations

import socket
import sys

from .raw import UPGRADE, text

LARGE = "select i, i * 2 as j, i * 3 as k from range(100000000) t(i)"


def main() -> None:
    sockets = []
    for _ in range(3):
        opened = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        opened.sendall(UPGRADE)
        opened.recv(4096)
        opened.sendall(text(type="subscribe", channel="flood"))
        opened.sendall(text(type="arrow", sql=LARGE, queryId=1, stream=True))
        opened.sendall(text(type="arrow", sql=LARGE, queryId=2))
        sockets.append(opened)
    print("ready", flush=True)
    while True:
        for opened in sockets:
            opened.recv(1 << 20)


if __name__ == "__main__":
    main()
