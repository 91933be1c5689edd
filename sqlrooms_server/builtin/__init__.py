"""Plugins that come with the server, off unless they are configured."""

from __future__ import annotations

from sqlrooms_server.builtin.files import Files
from sqlrooms_server.builtin.named_queries import NamedQueries
from sqlrooms_server.builtin.resume import Resume
from sqlrooms_server.builtin.static import Static
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.settings import Settings


def configured(settings: Settings) -> list[Plugin]:
    """Those that ``settings`` ask for, in the order in which they take part."""
    plugins: list[Plugin] = []
    if settings.queries:
        plugins.append(NamedQueries(settings))
    if settings.files:
        plugins.append(Files(settings))
    if settings.static:
        plugins.append(Static(settings))
    if settings.resume_window:
        plugins.append(Resume())
    return plugins
