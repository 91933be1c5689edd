"""Who is believed what about the address of a client."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import Proxies
from sqlrooms_server.transport.proxies import FORWARDED, UNIX, Client, normalised
from tests.conftest import LocalServer
from tests.recorder import Recorder
from tests.wire import DEADLINE

TRUSTED = ("10.0.0.0/8", "2001:db8::/32", "unix")


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ([], "10.0.0.1"),
        ([""], "10.0.0.1"),
        (["203.0.113.9"], "203.0.113.9"),
        (["203.0.113.9:4711"], "203.0.113.9"),
        (["[2a00::1]:4711"], "2a00::1"),
        (["2A00:0::1"], "2a00::1"),
        (["::ffff:203.0.113.9"], "203.0.113.9"),
        # What stands left of the first stranger, the stranger says.
        (["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        (["1.1.1.1, 203.0.113.9, 10.2.3.4,2001:db8::7"], "203.0.113.9"),
        (["rubbish, 203.0.113.9"], "203.0.113.9"),
        # All trusted: the farthest.
        (["10.9.9.9, 10.2.3.4"], "10.9.9.9"),
        # Rubbish where a trusted proxy should have put an address.
        (["203.0.113.9, rubbish"], "10.0.0.1"),
        (["203.0.113.9,"], "10.0.0.1"),
        (["203.0.113.9, 10.2.3.4, 999.1.1.1"], "10.0.0.1"),
        (["unknown"], "10.0.0.1"),
        (["203.0.113.9:port"], "10.0.0.1"),
        (["[2a00::1]x"], "10.0.0.1"),
        (["unix"], "10.0.0.1"),
    ],
)
def test_x_forwarded_for(lines: list[str], address: str) -> None:
    proxies = Proxies(TRUSTED)
    assert proxies.client("10.0.0.1", {"x-forwarded-for": lines}).address == address


@pytest.mark.parametrize(
    ("line", "client"),
    [
        ("for=203.0.113.9", Client("203.0.113.9", True)),
        ("For=203.0.113.9;Proto=HTTPS;host=a.b:1", Client("203.0.113.9", True, "https", "a.b:1")),
        ('for="[2a00::1]:47";by="x,y\\";z"', Client("2a00::1", True)),
        ("for=1.1.1.1;host=bad, for=203.0.113.9, for=10.1.1.1", Client("203.0.113.9", True)),
        ("for=_hidden;proto=gopher", Client("10.0.0.1", True)),
        ("for=203.0.113.9;", Client("10.0.0.1", True)),
        ("for=203.0.113.9, rubbish", Client("10.0.0.1", True)),
        ('for="203.0.113.9', Client("10.0.0.1", True)),
        (";" * 4000, Client("10.0.0.1", True)),
    ],
)
def test_forwarded(line: str, client: Client) -> None:
    proxies = Proxies(TRUSTED, FORWARDED)
    # The other kind came from the client, if it is there.
    lines = {"forwarded": [line], "x-forwarded-for": ["9.9.9.9"], "x-forwarded-host": ["x"]}
    assert proxies.client("10.0.0.1", lines) == client


def test_who_is_trusted() -> None:
    proxies = Proxies(TRUSTED)
    assert all(map(proxies.trusts, ("10.255.0.1", "2001:db8::5", UNIX)))
    assert not any(map(proxies.trusts, ("11.0.0.1", "2001:db9::5", "127.0.0.1", "::1", "")))
    assert not any(map(Proxies().trusts, ("127.0.0.1", UNIX)))
    for wrong in ("10.0.0.1/8", "localhost", "10.0.0.0/33", ""):
        with pytest.raises(StartupError, match="--trusted-proxy"):
            Proxies((wrong,))
    with pytest.raises(StartupError, match="--proxy-headers"):
        Settings(proxy_headers="x")


def test_addresses_of_sockets() -> None:
    assert normalised("127.0.0.1") == "127.0.0.1"
    assert normalised("0000:0000:0000:0000:0000:ffff:7f00:0001") == "127.0.0.1"
    assert normalised("2001:0db8:0000:0000:0000:0000:0000:0001") == "2001:db8::1"
    assert normalised("") == ""


@pytest.fixture(params=[("127.0.0.0/8",), ("10.0.0.0/8", "unix")], ids=["trusted", "stranger"])
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    made = Recorder(proxies=Proxies(request.param), proxy_headers=("X-Remote-User",))
    made.start()
    yield made
    made.transport.stop(time.monotonic() + 2)


def test_requests(recorder: Any, request: pytest.FixtureRequest) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", recorder.port, timeout=DEADLINE)
    connection.putrequest("GET", "/", skip_host=True)
    for name, value in (
        ("Host", "127.0.0.1:4000"),
        ("X-Forwarded-For", "1.1.1.1"),
        ("x-forwarded-for", "203.0.113.9"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "data.example.com"),
        ("X-Remote-User", "ann"),
        ("X-Remote-User", "eve"),
    ):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().read() == b"/"
    connection.close()
    seen = recorder.request
    if "trusted" in request.node.name:
        assert seen.is_from_proxy
        assert (seen.remote_address, seen.scheme) == ("203.0.113.9", "https")
        assert seen.forwarded_host == "data.example.com"
        assert seen.headers["x-remote-user"] == "ann, eve"
    else:
        assert not seen.is_from_proxy
        assert (seen.remote_address, seen.scheme) == ("127.0.0.1", "http")
        assert seen.forwarded_host is None
        assert "x-remote-user" not in seen.headers


def test_both_hosts_must_be_allowed(launch: Callable[..., LocalServer]) -> None:
    """Proxies pass on what their clients say of a host, or ask for localhost themselves."""
    server = launch(trusted_proxy=("127.0.0.1",), allow_host=("data.example.com",))
    for host, forwarded, status in (
        ("localhost", "data.example.com", 200),
        ("data.example.com", "localhost", 200),
        ("localhost", "evil.example", 403),
        ("evil.example", "data.example.com", 403),
    ):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
        headers = {"Host": host, "X-Forwarded-Host": forwarded, "X-Forwarded-For": "203.0.113.9"}
        connection.request("GET", "/connections", headers=headers)
        reply = connection.getresponse()
        assert reply.status == status, reply.read()
        connection.close()


def test_connections_show_the_client(launch: Callable[..., LocalServer]) -> None:
    server = launch(trusted_proxy=("127.0.0.1",), proxy_headers="forwarded")
    headers = {"Forwarded": "for=203.0.113.9;proto=https"}
    with server.connect(additional_headers=headers) as wire:
        wire.rows("select 1")
        (connection,) = server.server.connections.all()
        assert connection.remote_address == "203.0.113.9"
