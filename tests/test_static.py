"""A front end served by the server: its files, what it is told, and a page that connects."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server import StartupError
from sqlrooms_server.app_config import AppConfig
from sqlrooms_server.builtin.static import with_configuration
from sqlrooms_server.server import Server
from sqlrooms_server.settings import Settings
from tests.chromium import open_page, serve_pages
from tests.conftest import LocalServer, ServerProcess
from tests.http_client import Answer, ask

DEADLINE = 60

INDEX = "<!doctype html><html><HEAD lang=en><title>App</title></HEAD><body></body></html>"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    root = tmp_path / "dist"
    (root / "assets").mkdir(parents=True)
    (root / "docs").mkdir()
    (root / "index.html").write_text(INDEX)
    (root / "docs" / "index.html").write_text("<p>docs</p>")
    (root / "assets" / "app.js").write_text("plain")
    (root / "assets" / "app.js.gz").write_bytes(gzip.compress(b"plain"))
    (root / "assets" / "app.js.br").write_bytes(b"brotli")
    (root / "assets" / "x.wasm").write_bytes(b"\0asm")
    (root / ".env").write_text("SECRET=1")
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "secret").write_text("SECRET=2")
    return root


@pytest.fixture
def server(launch: Callable[..., LocalServer], pages: Path) -> LocalServer:
    return launch(static=str(pages))


def get(server: LocalServer, path: str, **headers: str) -> Answer:
    return ask(server.port, "GET", path, **headers)


def told(body: bytes) -> Any:
    before, _, rest = body.partition(b"<script>window.__SQLROOMS__=")
    assert b"<script" not in before
    return json.loads(rest.partition(b"</script>")[0])


def test_files_and_pages(server: LocalServer) -> None:
    answer = get(server, "/")
    assert answer.status == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert told(answer.body) == {
        "url": f"ws://127.0.0.1:{server.port}/",
        "httpUrl": f"http://127.0.0.1:{server.port}/",
        "needToken": False,
    }
    assert b"<HEAD lang=en><script>" in answer.body and b"<title>App</title>" in answer.body
    assert get(server, "/sqlrooms-config.json").json() == told(answer.body)
    assert get(server, "/index.html").body == answer.body
    assert get(server, "/", If_None_Match=answer.headers["etag"]).status == 304
    assert ask(server.port, "HEAD", "/").headers["content-length"] == str(len(answer.body))
    for name in ("content-security-policy", "x-content-type-options", "etag"):
        assert name in answer.headers
    assert b"docs" in get(server, "/docs/").body
    moved = get(server, "/docs")
    assert (moved.status, moved.headers["location"]) == (308, "./docs/")
    assert get(server, "/assets/x.wasm").headers["content-type"] == "application/wasm"


def test_places_of_an_app_are_its_page(server: LocalServer) -> None:
    assert b"__SQLROOMS__" in get(server, "/some/place", Accept="text/html,*/*").body
    assert get(server, "/some/place", Accept="application/json").status == 404
    assert get(server, "/some/place.js", Accept="text/html").status == 404
    assert b"__SQLROOMS__" in get(server, "/assets/", Accept="text/html").body
    assert ask(server.port, "POST", "/").status == 405


def test_what_was_compressed_before(server: LocalServer) -> None:
    for accepted, encoding, body in (
        ("gzip, deflate, br", "br", b"brotli"),
        ("gzip", "gzip", gzip.compress(b"plain")),
        ("gzip;q=0, br;q=0.0", None, b"plain"),
        ("", None, b"plain"),
    ):
        answer = get(server, "/assets/app.js", Accept_Encoding=accepted)
        assert answer.headers.get("content-encoding") == encoding
        assert (
            gzip.decompress(answer.body) == b"plain" if encoding == "gzip" else answer.body == body
        )
        assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
        assert answer.headers["vary"] == "Accept-Encoding"
    part = get(server, "/assets/app.js", Accept_Encoding="br", Range="bytes=1-2")
    assert (part.status, part.body) == (206, b"la")


@pytest.mark.parametrize(
    "path",
    [
        "/.env",
        "/%2eenv",
        "/link/secret",
        "/../secret",
        "/..%2fsecret",
        "//secret",
        "/a%00b",
        "/%ff",
    ],
)
def test_nothing_else_is_served(server: LocalServer, path: str) -> None:
    answer = get(server, path)
    assert answer.status in (400, 404) and b"SECRET" not in answer.body


def test_routes_of_the_server_come_first(server: LocalServer, pages: Path) -> None:
    (pages / "healthz").write_text("mine")
    assert get(server, "/healthz").body != b"mine"
    assert get(server, "/channels/c", Accept="text/html").status == 405
    with server.connect() as wire:
        assert wire.rows("select 1 as a") == [{"a": 1}]


def test_a_token_is_asked_for_and_not_told(launch: Callable[..., LocalServer], pages: Path) -> None:
    server = launch(static=str(pages), auth_token="the-secret-token")
    answer = get(server, "/")
    assert told(answer.body)["needToken"] is True and b"the-secret-token" not in answer.body
    assert ask(server.port, "GET", "/connections").status == 401


def test_its_own_page_may_connect_under_a_name_that_was_given(
    launch: Callable[..., LocalServer], pages: Path
) -> None:
    def status(server: LocalServer, origin: str) -> int:
        name = f"data.example.com:{server.port}"
        return get(server, "/connections", Host=name, Origin=origin.format(name)).status

    server = launch(static=str(pages), allow_host=("data.example.com",))
    assert status(server, "http://{}") == 200
    for origin in ("https://{}", "http://{}0", "http://data.example.com", "null"):
        assert status(server, origin) == 403
    evil = get(server, "/", Host="evil.example")
    assert evil.status == 403 and b"--allow-host evil.example" in evil.body
    assert status(launch(static=str(pages), allow_host=("*",)), "http://{}") == 403
    assert status(launch(allow_host=("data.example.com",)), "http://{}") == 403


def test_an_app_has_a_front_end_of_its_own(pages: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("of sales")
    own = {"static": str(pages), "files": (f"data={tmp_path}/data",)}
    server = Server(Settings(port=0), apps=[AppConfig("sales", own)])
    port = server.start()
    try:
        answer = ask(port, "GET", "/sales/")
        assert told(answer.body)["url"] == f"ws://127.0.0.1:{port}/sales/"
        assert told(ask(port, "GET", "/sales/some/place", Accept="text/html").body) == told(
            answer.body
        )
        assert ask(port, "GET", "/sales").headers["location"] == "sales/"
        assert ask(port, "GET", "/sales/docs").headers["location"] == "./docs/"
        assert ask(port, "GET", "/sales/files/data/file").body == b"of sales"
        for path in ("/", "/files/data/file", "/sqlrooms-config.json"):
            assert ask(port, "GET", path).status == 404
    finally:
        server.stop()
    other = AppConfig("other", {"db_path": str(tmp_path / "data" / "my.duckdb")})
    with pytest.raises(StartupError, match=r"--files data: .* holds the database"):
        Server(Settings(port=0), apps=[AppConfig("sales", own), other])


def test_the_script_is_only_what_it_should_be() -> None:
    configuration = {"url": "</script><!--\u2028&"}
    for page, before in (
        (b"<head><title></head>", b"<head>"),
        (b"<p><!--sqlrooms-config--></p><head>", b"<p>"),
        (b"<header></header></head>", b"<header></header>"),
        (b"<p>none", b""),
    ):
        made = with_configuration(page, configuration)
        assert made.startswith(before + b"<script>window.__SQLROOMS__=")
        assert made.count(b"</script>") == 1 and b"<!--\\" not in made
        assert told(made) == configuration


PAGE = """<!doctype html><head><title>One process</title></head><body><script type="module">
const report = (value) => fetch(`http://127.0.0.1:REPORT/`, {
  method: 'POST', mode: 'no-cors', body: JSON.stringify(value)});
const {url, httpUrl, needToken} = window.__SQLROOMS__;
const ws = new WebSocket(url);
ws.onerror = () => report({error: 'no connection'});
ws.onopen = () => ws.send(JSON.stringify({type: 'json', sql: 'select 42 as a', queryId: 1}));
ws.onmessage = async (event) => {
  const message = JSON.parse(event.data);
  if (message.queryId !== 1) return;
  document.body.append(message.data);
  const file = await fetch(new URL('files/data/hello.txt', httpUrl)).then((r) => r.text());
  const put = await fetch(new URL('files/data/made.txt', httpUrl), {method: 'PUT', body: 'made'});
  report({shown: document.body.lastChild.textContent, needToken, file, status: put.status});
};
</script></body>"""


@pytest.mark.timeout(2 * DEADLINE)
def test_a_page_of_the_server_shows_a_row(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hello.txt").write_text("hello")
    with serve_pages({}) as site:
        (tmp_path / "dist" / "index.html").write_text(PAGE.replace("REPORT", str(site.port)))
        server = serve("--static", f"{tmp_path}/dist", "--files", f"data={tmp_path}/data:rw")
        with open_page(site, f"http://localhost:{server.port}/", tmp_path / "chromium.log"):
            report = site.report(DEADLINE)
    assert report == {"shown": '[{"a":42}]', "needToken": False, "file": "hello", "status": 201}
    assert (tmp_path / "data" / "made.txt").read_text() == "made"
