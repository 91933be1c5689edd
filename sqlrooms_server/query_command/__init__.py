"""``sqlrooms-server query``: one statement from the command line. Uses nothing but the client."""

from sqlrooms_server.query_command.command import main

__all__ = ["main"]
