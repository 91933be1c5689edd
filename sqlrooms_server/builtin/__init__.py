"""Plugins that come with the server, off unless they are configured."""

from __future__ import annotations

from sqlrooms_server.plugin import Plugin
from sqlrooms_server.settings import Settings


def configured(settings: Settings) -> list[Plugin]:
    """Those that ``settings`` ask for, in the order in which they take part.

    Raises ``StartupError``. What nobody asks for is not even loaded.
    """
    plugins: list[Plugin] = []
    if settings.queries:
        from sqlrooms_server.builtin.named_queries import NamedQueries

        plugins.append(NamedQueries(settings))
    if settings.files:
        from sqlrooms_server.builtin.files import Files

        plugins.append(Files(settings))
    if settings.static:
        from sqlrooms_server.builtin.static import Static

        plugins.append(Static(settings))
    if settings.resume_window:
        from sqlrooms_server.builtin.resume import Resume

        plugins.append(Resume())
    return plugins
