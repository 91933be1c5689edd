"""TLS: certificates that can and cannot be used, and everything else over it."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sqlrooms_server.client import connect, connect_async
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import Certificate
from tests import test_topics, test_transport
from tests.certificates import Files
from tests.conftest import LocalServer, ServerProcess
from tests.leaks import assert_leaks_nothing
from tests.nursery import Done, Nursery
from tests.recorder import Recorder
from tests.wire import DEADLINE, Wire


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusted(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of this process trust the authority unless they are told another."""
    monkeypatch.setenv("SSL_CERT_FILE", files.authority)


@pytest.fixture(scope="module")
def secure(files: Files) -> Iterator[LocalServer]:
    local = LocalServer(Settings(port=0, **files.settings))  # type: ignore[arg-type]
    local.url = f"wss://127.0.0.1:{local.port}"
    yield local
    local.server.stop()


@pytest.fixture
def secure_recorder(files: Files) -> Iterator[Recorder]:
    made = Recorder(certificate=Certificate(files.certificate, files.key))
    made.start()
    yield made
    made.transport.stop(time.monotonic() + 2)


# Certificates


def test_what_cannot_be_used_is_named(files: Files, tmp_path: Path) -> None:
    good, key = files.certificate, files.key
    _, other = files.issue("other")
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x00garbage")
    half = tmp_path / "half"
    half.write_bytes(Path(good).read_bytes()[:300])
    for certificate, key_file, expected in (
        ("/nowhere.pem", key, "Cannot read --tls-cert /nowhere.pem: No such file"),
        (good, "/nowhere.key", "Cannot read --tls-key /nowhere.key: No such file"),
        (str(tmp_path), key, "Is a directory"),
        (str(garbage), key, f"--tls-cert {garbage} has no certificate"),
        (key, key, "has no certificate"),
        (str(half), key, f"--tls-cert {half} and --tls-key {key} cannot be used"),
        (good, str(garbage), f"--tls-key {garbage} has no private key"),
        (good, good, "has no private key"),
        (good, other, "do not belong together"),
        (good, files.encrypted_key(), "is encrypted"),
    ):
        with pytest.raises(StartupError, match=r"^[^\n]*$") as error:
            Certificate(certificate, key_file).check()
        assert expected in str(error.value)


def test_one_without_the_other() -> None:
    with pytest.raises(StartupError, match="--tls-cert needs --tls-key"):
        Settings(tls_cert="a")
    with pytest.raises(StartupError, match="--tls-key needs --tls-cert"):
        Settings(tls_key="a")


def test_what_the_library_cannot_use_is_said_at_the_start(files: Files, tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "c.key"
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:secp256k1"
    command = (
        f"openssl req -x509 -nodes -subj /CN=localhost {curve} -keyout {key} -out {certificate}"
    )
    made = subprocess.run(command.split(), capture_output=True)
    if made.returncode:
        pytest.skip("no openssl that makes such keys")
    recorder = Recorder(certificate=Certificate(str(certificate), str(key)))
    with pytest.raises(StartupError, match="The TLS library cannot use"):
        recorder.start()


def test_warnings(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    Certificate(files.certificate, files.key).check()
    assert caplog.messages == []
    certificate, key = files.issue("expired", datetime(2001, 1, 1, tzinfo=timezone.utc))
    os.chmod(key, 0o644)
    Certificate(certificate, key).check()
    readable, expired = caplog.messages
    assert f"can read the key {key}" in readable
    assert f"{certificate} has expired" in expired


def test_beyond_loopback_without_it_is_warned_of(
    launch: Callable[..., LocalServer], files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    launch(host="0.0.0.0", auth_token="t")
    (warning,) = caplog.messages
    assert all(words in warning for words in ("travel readable", "--tls-cert", "proxy"))
    caplog.clear()
    launch(host="0.0.0.0", auth_token="t", **files.settings)
    launch()
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


# What works without it


@pytest.mark.parametrize(
    "test",
    [
        test_transport.test_messages_of_every_size_come_back_whole,
        test_transport.test_a_stream_is_one_message_in_order_with_others,
        test_transport.test_a_source_is_pulled_only_as_fast_as_the_client_reads,
        test_transport.test_a_client_that_does_not_read_is_cut_off,
        test_transport.test_a_client_is_told_that_too_much_waits_behind_a_pause,
        test_transport.test_sending_closes_nothing_before_it_returns,
        test_transport.test_closing_comes_after_what_was_sent,
        test_transport.test_what_was_sent_arrives_before_the_end_of_a_stop,
        test_transport.test_path_query_headers_and_subprotocol,
    ],
    ids=lambda test: test.__name__,
)
def test_sending(
    test: Callable[[Recorder], None], secure_recorder: Recorder, trusted: None
) -> None:
    test(secure_recorder)


def test_no_payload_is_lost(secure_recorder: Recorder, trusted: None) -> None:
    test_transport.test_no_payload_is_lost_when_the_kernel_is_full(secure_recorder, 200 << 10)


@pytest.mark.parametrize(
    "test",
    [
        test_topics.test_between_replies_of_every_kind,
        test_topics.test_who_is_closed_hears_what_was_said_before,
        test_topics.test_targets_and_answers_keep_the_order,
    ],
    ids=lambda test: test.__name__,
)
def test_topics_too(
    test: Callable[[LocalServer], None], secure: LocalServer, trusted: None
) -> None:
    test(secure)


def test_uploads_and_large_results(secure: LocalServer, trusted: None) -> None:
    with secure.connect() as wire:
        table = pa.table({"i": range(1_000_000)})
        assert wire.upload(table, tableName="t", queryId="u")["type"] == "uploadAck"
        assert wire.table("select i, i * 2 as j from t order by i").num_rows == 1_000_000
        assert wire.rows("select sum(i)::bigint as s from t") == [{"s": 499_999_500_000}]


def test_http(secure: LocalServer, files: Files) -> None:
    connection = http.client.HTTPSConnection(
        "127.0.0.1", secure.port, timeout=DEADLINE, context=files.context()
    )
    with secure.connect(ssl=files.context()) as wire:
        wire.request(type="subscribe", channel="c")
        for method, path, body in (
            ("GET", "/readyz", None),
            ("POST", "/channels/c", b"[1]"),
            ("GET", "/healthz", None),
        ):
            headers = {"content-type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            assert reply.status == 200, reply.read()
            reply.read()
        assert wire.receive()["payload"] == [1]
    connection.close()


def test_a_hundred_starts_and_stops_leak_nothing(files: Files) -> None:
    context = files.context()

    def cycle() -> None:
        recorder = Recorder(certificate=Certificate(files.certificate, files.key))
        recorder.start()
        # One closes by itself, the other one is closed by the stop in the middle of its handshake.
        with Wire(recorder.url, ssl=context) as wire:
            wire.send_raw("x")
            assert wire.socket.recv(timeout=DEADLINE) == "x"
        with socket.create_connection(("127.0.0.1", recorder.port)) as silent:
            silent.sendall(b"\x16\x03\x01")
            recorder.transport.stop(time.monotonic() + 2)

    assert_leaks_nothing(cycle, ("uws",))


def test_the_wrong_bytes_harm_nobody(
    secure: LocalServer, launch: Callable[..., LocalServer], trusted: None
) -> None:
    """Two servers in one process, with TLS and without: a client of one asks the other."""
    plain = launch()
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    hello = ssl.MemoryBIO()
    handshake = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello)
    with pytest.raises(ssl.SSLWantReadError):
        handshake.do_handshake()
    with secure.connect() as on_secure, plain.connect() as on_plain:
        for port, data in (
            (secure.port, request),
            (secure.port, b"\x16\x03\x01\xff\xff" + bytes(70_000)),
            (plain.port, hello.read()),
        ):
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
                try:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1000):
                        pass
                except ConnectionError:
                    pass
        for wire in (on_secure, on_plain):
            assert wire.rows("select 1 as a") == [{"a": 1}]


# Clients and the command line


def test_python_clients(secure: LocalServer, files: Files) -> None:
    with connect(secure.url, ssl=files.context()) as db:
        assert db.rows("select 1 as a") == [{"a": 1}]

    async def ask() -> Any:
        async with connect_async(secure.url, ssl=files.context()) as db:
            return await db.rows("select 2 as a")

    assert asyncio.run(ask()) == [{"a": 2}]
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(secure.url)


def test_the_command_line(
    serve: Callable[..., ServerProcess], nursery: Nursery, files: Files
) -> None:
    server = serve("--tls-cert", files.certificate, "--tls-key", files.key)
    assert f"wss://localhost:{server.port}" in server.welcome
    assert f"https://localhost:{server.port}/readyz" in server.welcome

    def query(*arguments: str) -> Done:
        return nursery.run("query", "--url", f"wss://localhost:{server.port}", *arguments)

    done = query("--ca-file", files.authority, "--format", "csv", "select 42 as answer")
    assert (done.returncode, done.stdout.split()) == (0, [b'"answer"', b"42"])
    stranger = query("select 42 as answer")
    assert stranger.returncode == 3
    assert b"Cannot trust" in stranger.stderr and b"--ca-file" in stranger.stderr
    assert b"no certificate" in query("--ca-file", files.key, "select 1").stderr
    assert server.stop() == 0
