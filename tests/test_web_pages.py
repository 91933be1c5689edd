"""What pages of other origins can do, in a real Chromium: nothing, unless they may connect.

Names lead to this machine by a rule of the browser, as they would after DNS rebinding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import open_page, serve_pages
from tests.conftest import ServerProcess
from tests.wire import Wire

# A cold browser on a busy machine.
DEADLINE = 60

EVIL, ALLOWED = "evil.example", "app.example"

PAGE = """
<!doctype html>
<title>A page that tries what it can</title>
<script type="module">
const {port, frames} = await (await fetch('/request')).json();
const failed = () => 'failed';

function socket(host) {
  return new Promise((resolve) => {
    const ws = new WebSocket(`ws://${host}:${port}/`);
    ws.onerror = () => resolve('failed');
    ws.onopen = () => ws.send(JSON.stringify(
      {type: 'notify', channel: 'heard', payload: `${location.hostname} by ${host}`, queryId: 1}));
    ws.onmessage = (event) => {
      if (typeof event.data === 'string' && JSON.parse(event.data).queryId === 1) {
        resolve(JSON.parse(event.data).type);
        ws.close();
      }
    };
  });
}

function say(host, mode, kind) {
  const init = {method: 'POST', mode, headers: {'Content-Type': kind}, body: '"over HTTP"'};
  return fetch(`http://${host}:${port}/channels/heard`, init).then((r) => r.type, failed);
}

function read(host, path) {
  return fetch(`http://${host}:${port}${path}`).then((r) => r.text(), failed);
}

const own = location.hostname;
const report = {
  page: own,
  'socket by address': await socket('127.0.0.1'),
  'socket by localhost': await socket('localhost'),
  'socket by own name': await socket(own),
  'form by address': await say('127.0.0.1', 'no-cors', 'text/plain'),
  'form by own name': await say(own, 'no-cors', 'text/plain'),
  'JSON by address': await say('127.0.0.1', 'cors', 'application/json'),
  'read by address': await read('127.0.0.1', '/version'),
  'read by own name': await read(own, '/connections'),
};
await fetch('/report', {method: 'POST', body: JSON.stringify(report)});
for (const host of own === 'evil.example' ? frames : []) {
  const frame = document.createElement('iframe');
  frame.src = location.href.replace(own, host);
  document.body.append(frame);
}
</script>
<body>
"""


@pytest.mark.timeout(4 * DEADLINE)
def test_only_pages_that_may_connect(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    request: dict[str, Any] = {"frames": [ALLOWED, "localhost"]}
    content = {"/page.html": ("text/html", PAGE.encode()), "/request": ("application/json", b"")}
    with serve_pages(content) as site:
        server = serve("--allow-origin", f"http://{ALLOWED}:{site.port}")
        request["port"] = server.port
        content["/request"] = ("application/json", json.dumps(request).encode())
        rules = f"--host-resolver-rules=MAP {EVIL} 127.0.0.1, MAP {ALLOWED} 127.0.0.1"
        with (
            Wire(server.url) as listener,
            open_page(site, site.url(EVIL), tmp_path / "chromium.log", [rules]),
        ):
            listener.request(type="subscribe", channel="heard")
            reports = [site.report(DEADLINE) for _ in range(3)]
            assert not [report["error"] for report in reports if "error" in report]
            by_page = {report.pop("page"): report for report in reports}
            listener.send(type="notify", channel="heard", payload="the end")
            heard = []
            while (said := listener.receive())["type"] == "notifyAck" or said[
                "payload"
            ] != "the end":
                heard.append(said["payload"])
    assert set(by_page[EVIL].values()) == {"failed", "opaque"}
    assert by_page[EVIL]["socket by own name"] == "failed"
    # It may connect, under the names of this machine, and send and read over HTTP.
    may = {
        "socket by address": "notifyAck",
        "socket by localhost": "notifyAck",
        "JSON by address": "cors",
        "read by address": by_page[ALLOWED]["read by address"],
    }
    assert '"sqlrooms-server"' in may["read by address"]
    assert by_page[ALLOWED] == {**by_page[EVIL], **may}
    localhost = by_page["localhost"]
    assert '"connections"' in localhost["read by own name"]
    may |= {"socket by own name": "notifyAck", "read by own name": localhost["read by own name"]}
    assert localhost == {**by_page[EVIL], **may}
    assert sorted(heard) == [
        f"{ALLOWED} by 127.0.0.1",
        f"{ALLOWED} by localhost",
        "localhost by 127.0.0.1",
        "localhost by localhost",
        "localhost by localhost",
        "over HTTP",
        "over HTTP",
    ]
    server.stop()
    evil = f"http://{EVIL}:{site.port}"
    assert f"origin '{evil}' is not allowed; --allow-origin {evil} would" in server.errors
    assert f"host '{EVIL}:{server.port}' is not allowed; --allow-host {EVIL} would" in server.errors
