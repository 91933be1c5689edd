"""The table of settings: sources, their order, and errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server import configuration
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings, fields


def load(*sources: Any) -> Settings:
    return configuration.load(*sources).settings


def test_defaults() -> None:
    settings = load({}, {})
    assert settings == Settings()
    assert (settings.host, settings.port, settings.db_path) == ("127.0.0.1", 4000, ":memory:")
    assert settings.worker_count >= 4


def test_flag_wins_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "s.toml"
    config.write_text('port = 1\nmax-queue = 2\nhost = "a"\nread_only = true\n')
    environment = {"SQLROOMS_PORT": "3", "SQLROOMS_MAX_QUEUE": "4", "PORT": "9"}
    settings = load({"port": 5}, environment, str(config))
    assert (settings.port, settings.max_queue, settings.host) == (5, 4, "a")
    assert settings.read_only


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_message_size", "1MiB", 1 << 20),
        ("max_message_size", "2 MB", 2_000_000),
        ("max_message_size", "4096", 4096),
        ("port", " 80 ", 80),
        ("read_only", "yes", True),
        ("read_only", "0", False),
        ("extensions", "httpfs, h3@community,,", ("httpfs", "h3@community")),
        ("extensions", "", ()),
        ("db_path", "/a b/c", "/a b/c"),
    ],
)
def test_values_from_text(tmp_path: Path, name: str, text: str, value: Any) -> None:
    assert getattr(load({}, {f"SQLROOMS_{name.upper()}": text}), name) == value
    config = tmp_path / "s.toml"
    config.write_text(f"{name} = {text!r}\n")
    assert getattr(load({}, {}, str(config)), name) == value


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("SQLROOMS_PORT", "x"),
        ("SQLROOMS_PORT", "5KiB"),
        ("SQLROOMS_PORT", "-1"),
        ("SQLROOMS_MAX_MESSAGE_SIZE", "lots"),
        ("SQLROOMS_READ_ONLY", "maybe"),
    ],
)
def test_bad_values_name_their_source(variable: str, text: str) -> None:
    with pytest.raises(StartupError, match=variable):
        load({}, {variable: text})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("port", 65536),
        ("idle_timeout", 7),
        ("idle_timeout", 961),
        ("max_message_size", 1 << 31),
        ("log_level", "loud"),
        ("meta_namespace", " "),
        ("workers", -1),
        ("max_queue", 0),
    ],
)
def test_values_out_of_range_name_the_flag(setting: str, value: Any) -> None:
    with pytest.raises(StartupError, match="--" + setting.replace("_", "-")):
        Settings(**{setting: value})


def test_messages_larger_than_what_may_wait() -> None:
    with pytest.raises(StartupError, match=r"--max-notify-size .* --max-queued-bytes"):
        Settings(max_notify_size=2 << 20, max_queued_bytes=1 << 20)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("port = ", "not valid TOML"),
        ("ports = 5", "ports in .* is not a setting"),
        ("[app.sales]", "app in .* is not a setting; tables are apps.NAME and plugins.NAME"),
        ("port = 1.5", "port in .* must be int"),
        ("port = true", "port in .* must be int"),
        ("extensions = [1]", "list of strings"),
        ("read_only = 1", "read_only in .* must be bool"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, expected: str) -> None:
    config = tmp_path / "s.toml"
    config.write_text(content)
    with pytest.raises(StartupError, match=expected):
        load({}, {}, str(config))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"Cannot read the settings file .*nope\.toml"):
        load({}, {}, str(tmp_path / "nope.toml"))


def test_the_token_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  s3cret\nsecond line\n")
    assert load({"auth_token_file": str(path)}, {}).auth_token == "s3cret"
    with pytest.raises(StartupError, match="keep one of"):
        load({"auth_token_file": str(path)}, {"SQLROOMS_AUTH_TOKEN": "x"})
    path.write_text("\n")
    with pytest.raises(StartupError, match="no token"):
        load({"auth_token_file": str(path)}, {})
    with pytest.raises(StartupError, match="Cannot read the token file"):
        load({"auth_token_file": str(tmp_path / "none")}, {})


@pytest.mark.parametrize("name", ["auth_token", "auth_token_file", "tokens", "sandbox"])
def test_what_protects_is_not_empty(tmp_path: Path, name: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(f'{name} = " "\n')
    for flags, environment, config in (
        ({name: ""}, {}, None),
        ({}, {f"SQLROOMS_{name.upper()}": " "}, None),
        ({}, {}, str(path)),
    ):
        with pytest.raises(StartupError, match="is empty, which would protect nothing"):
            load(flags, environment, config)


def test_the_token_is_never_shown() -> None:
    assert "s3cret" not in repr(Settings(auth_token="s3cret"))


def test_every_setting_has_a_help_text() -> None:
    for field in fields():
        assert field.metadata["help"].endswith((".", ").")), field.name
