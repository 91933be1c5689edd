"""One app: who may come to it, what clients can ask of it, and the database that it asks."""

from sqlrooms_server.app.parts import App, Shared

__all__ = ["App", "Shared"]
