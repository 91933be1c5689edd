"""Plugins that come with the server, off unless the settings ask for them."""

from __future__ import annotations

from sqlrooms_server.builtin.files import Files
from sqlrooms_server.builtin.static import Static
from sqlrooms_server.plugin import Plugin
from sqlrooms_server.settings import Settings


def configured(settings: Settings) -> list[Plugin]:
    """Those that ``settings`` ask for. Raises ``StartupError``."""
    plugins: list[Plugin] = []
    if settings.files:
        plugins.append(Files(settings))
    if settings.static:
        plugins.append(Static(settings))
    return plugins
