"""Finding plugins: in modules, in files, and among what is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from sqlrooms_server.errors import StartupError
from sqlrooms_server.plugin import Plugin

ENTRY_POINTS = "sqlrooms_server.plugins"
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def load(
    places: Sequence[str],
    given: Sequence[Plugin] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Plugin]:
    """The plugins at ``places``, in that order, and those ``given``. Raises ``StartupError``.

    ``options`` are what each is told, by its name.

    A place is ``module:Name``, the path of a file, ``path.py`` or ``path.py:Name``, or the name of
    an entry point. ``Name`` is a plugin, or a class of one; of a file without it, the only one that
    is defined there.
    """
    plugins = [_load(place) for place in places]
    names: dict[str, str] = {}
    for plugin, place in zip(plugins, places, strict=True):
        if plugin.name in names:
            raise StartupError(
                f"The plugins {names[plugin.name]} and {place} are both called {plugin.name!r}; "
                "give one of them another name."
            )
        names[plugin.name] = place
    plugins += given
    for name, values in (options or {}).items():
        told = [plugin for plugin in plugins if plugin.name == name]
        if not told:
            known = ", ".join(sorted(plugin.name for plugin in plugins)) or "none"
            raise StartupError(
                f"There are options of a plugin {name!r} (plugins.{name}), which is not loaded; "
                f"loaded are: {known}."
            )
        for plugin in told:
            plugin.options = values
    return plugins


def _load(place: str) -> Plugin:
    path, _, name = place.partition(".py:") if ".py:" in place else (place, "", "")
    try:
        if place.endswith(".py") or name:
            file = Path(path if path.endswith(".py") else f"{path}.py")
            return _plugin(_found(_module_of(file, place), name, place), place)
        if ":" in place:
            module, _, name = place.partition(":")
            return _plugin(_found(importlib.import_module(module), name, place), place)
        return _plugin(_installed(place), place)
    except StartupError:
        raise
    except Exception as error:  # guard: whatever the code of a plugin does when it is imported
        raise StartupError(f"Cannot load the plugin {place}: {_told(error)}.") from error


def _module_of(path: Path, place: str) -> ModuleType:
    if not path.is_file():
        raise StartupError(f"Cannot load the plugin {place}: there is no file {path}.")
    # Not under its own name, which may be that of another module; each time it is another one, so
    # that apps do not share what is in it.
    own = f"sqlrooms_plugin_{path.stem}_{abs(hash(path.resolve())):x}"
    name = next(name for n in count() if (name := f"{own}_{n}") not in sys.modules)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their modules up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _found(module: ModuleType, name: str, place: str) -> Any:
    if name:
        if not hasattr(module, name):
            there = " and ".join(_names(module)) or "none"
            raise StartupError(
                f"Cannot load the plugin {place}: it has no {name!r}; its plugins are: {there}."
            )
        return getattr(module, name)
    names = _names(module)
    if not names:
        raise StartupError(f"Cannot load the plugin {place}: there is no plugin in it.")
    if len(names) > 1:
        raise StartupError(
            f"Cannot load the plugin {place}: it has {len(names)} plugins, {' and '.join(names)}; "
            f"name one, as in {place}:{names[0]}."
        )
    return getattr(module, names[0])


def _names(module: ModuleType) -> list[str]:
    """The plugins that ``module`` has, or else those of which it has the classes."""
    things = vars(module).items()
    made = {id(value): name for name, value in reversed(things) if isinstance(value, Plugin)}
    classes = [
        name
        for name, value in things
        if isinstance(value, type)
        and issubclass(value, Plugin)
        and value.__module__ == module.__name__
    ]
    return list(reversed(made.values())) or classes


def _installed(name: str) -> Any:
    # Not at the top: few ask for it.
    from importlib import metadata

    known = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in known:
        installed = ", ".join(sorted(known)) or "none"
        raise StartupError(
            f"No plugin {name!r} is installed (installed are: {installed}). A plugin may also be "
            "module:Name, or the path of a .py file."
        )
    return known[name].load()


def _plugin(found: Any, place: str) -> Plugin:
    plugin = found() if isinstance(found, type) else found
    if not isinstance(plugin, Plugin):
        raise StartupError(
            f"Cannot load the plugin {place}: it is of type {type(plugin).__name__}, not a "
            "sqlrooms_server.Plugin."
        )
    if not plugin.name:
        plugin.name = type(plugin).__name__
    return plugin


def _told(error: Exception) -> str:
    """What happened and where, in one line."""
    # Not where this package, or Python, raised it: nobody can mend it there. What cannot be read
    # as Python says itself where.
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PACKAGE, "<"))
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{where}"
