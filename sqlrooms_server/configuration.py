"""Where settings come from, and what the configuration file says besides: plugins and apps.

A value is taken from the command line, else from ``SQLROOMS_<NAME>``, else from the TOML file,
else the default.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlrooms_server.app_config import AppConfig, PluginOptions, in_app
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings, environment_variable, fields, flag, parse

# A variable of a script that was never set must not open a server which was to be closed.
_GUARDS = ("auth_token", "auth_token_file", "tokens", "sandbox")


@dataclasses.dataclass(frozen=True, slots=True)
class Configuration:
    """What a server is told before it starts. ``options`` are those of its plugins."""

    settings: Settings
    options: PluginOptions
    apps: tuple[AppConfig, ...]


def load(
    flags: Mapping[str, Any], environment: Mapping[str, str], config: str | None = None
) -> Configuration:
    """Merge the sources of settings.

    ``flags`` holds only the values given on the command line. Raises ``StartupError`` naming
    the source of a bad value.
    """
    values: dict[str, Any] = {}
    options: PluginOptions = {}
    apps: tuple[AppConfig, ...] = ()
    if config:
        path = Path(config)
        table = _read(path)
        options = _options(table, "plugins", path)
        apps = tuple(_app(name, app, path) for name, app in _tables(table, "apps", path))
        values.update(_settings(table, str(path)))
    for field in fields():
        variable = environment_variable(field.name)
        if variable in environment:
            values[field.name] = parse(field, environment[variable], variable)
    values.update(flags)
    _complete(values)
    return Configuration(Settings(**values), options, apps)


def parse_toml(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """``data`` of the TOML file ``path``, which errors call ``what``. Raises ``StartupError``."""
    # Not at the top: most servers start without a file.
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        table: dict[str, Any] = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise StartupError(f"The {what} {path} is not valid TOML: {error}.") from error
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartupError(f"Cannot read the settings file {path}: {error.strerror}.") from error
    return parse_toml(data, path, "settings file")


def _app(name: str, table: dict[str, Any], path: Path) -> AppConfig:
    """What ``[apps.NAME]`` says."""
    where = f"[apps.{name}] of {path}"
    options = _options(table, f"apps.{name}.plugins", path)
    place = table.pop("path", "")
    if not isinstance(place, str):
        raise StartupError(f"path in {where} must be a text, not {place!r}.")
    values = _settings(table, where)
    with in_app(name):
        _complete(values)
    return AppConfig(name, values, path=place, options=options)


def _options(table: dict[str, Any], key: str, path: Path) -> PluginOptions:
    return dict(_tables(table, key, path))


def _tables(table: dict[str, Any], key: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables below the last part of ``key``, which are taken out of ``table``."""
    found = table.pop(key.rpartition(".")[2], {})
    if not isinstance(found, dict):
        raise StartupError(f"{key} in {path} must be tables, such as [{key}.name].")
    for name, values in found.items():
        if not isinstance(values, dict):
            raise StartupError(f"{key}.{name} in {path} must be a table.")
        yield name, values


def _settings(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = {field.name: field for field in fields()}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        source = f"{key} in {where}"
        if name not in known and isinstance(value, dict):
            raise StartupError(f"{source} is not a setting; tables are apps.NAME and plugins.NAME.")
        if name not in known:
            raise StartupError(f"{source} is not a setting; see sqlrooms-server --help.")
        values[name] = _checked(known[name], value, source)
    return values


def _checked(field: dataclasses.Field[Any], value: Any, source: str) -> Any:
    if isinstance(field.default, tuple) and isinstance(value, list):
        if all(isinstance(part, str) for part in value):
            return tuple(value)
        raise StartupError(f"{source} must be a list of strings.")
    if isinstance(value, str):
        return parse(field, value, source)
    if type(value) is type(field.default):
        return value
    raise StartupError(f"{source} must be {type(field.default).__name__}, not {value!r}.")


def _complete(values: dict[str, Any]) -> None:
    """Refuse what protects nothing, and read the file of the token."""
    for name in _GUARDS:
        if values.get(name) == "":
            raise StartupError(
                f"{flag(name)} or {environment_variable(name)} is empty, which would protect "
                "nothing; leave it out if that is meant."
            )
    if values.get("auth_token_file"):
        if values.get("auth_token"):
            raise StartupError(
                "Both a token and a token file are given; keep one of "
                "--auth-token-file and SQLROOMS_AUTH_TOKEN."
            )
        values["auth_token"] = _token_from_file(values["auth_token_file"])


def _token_from_file(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise StartupError(f"Cannot read the token file {path}: {reason}.") from error
    token = lines[0].strip() if lines else ""
    if not token:
        raise StartupError(f"The token file {path} has no token in its first line.")
    return token
