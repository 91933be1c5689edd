"""Files of configured directories: what can be had and changed, and everything else that cannot."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from sqlrooms_server import StartupError
from sqlrooms_server.settings import Settings
from tests.conftest import LocalServer, ServerProcess
from tests.http_client import Answer, ask
from tests.wire import DEADLINE, Arrow, Wire

SECRET = b"nobody may read this"

TOKENS = """
[roles.reader]
read_files = ["data/*", "home/{{user}}/*"]

[roles.writer]
read_files = ["box/*"]
write_files = ["box/in/*"]

[roles.nothing]
"""


class Place:
    """Directories with files, and a server of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.box = directory / "box"
        (self.data / "sub").mkdir(parents=True)
        (self.box / "in").mkdir(parents=True)
        (directory / "secret").write_bytes(SECRET)
        (directory / "data-more").mkdir()
        (directory / "data-more" / "file").write_bytes(SECRET)
        (self.data / "plain.txt").write_bytes(bytes(range(256)) * 40)
        (self.data / "page.html").write_text("<script>alert(1)</script>")
        (self.data / 'a "b"; é\u2028.txt').write_text("odd")
        (self.data / ".hidden").write_bytes(SECRET)
        (self.data / "sub" / "deep.csv").write_text("a,b\n1,x\n2,y\n3,z\n")
        (self.data / "link").symlink_to(directory / "secret")
        (self.data / "inside").symlink_to(self.data / "plain.txt")
        (self.data / "out").symlink_to(directory)
        os.mkfifo(self.data / "pipe")
        self.local = LocalServer(
            Settings(
                port=0,
                files=(f"data={self.data}", f"box={self.box}:rw"),
                max_file_size=1 << 20,
                sandbox="select",
            )
        )
        self.port = self.local.port

    def get(self, path: str, **headers: str) -> Answer:
        return ask(self.port, "GET", f"/files/{path}", **headers)

    def left(self) -> list[str]:
        """All names in the writable directory."""
        return sorted(str(path.relative_to(self.box)) for path in self.box.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("files"))
    yield made
    made.local.server.stop()


@pytest.fixture
def wire(place: Place) -> Iterator[Wire]:
    with place.local.connect() as connected:
        yield connected


def test_files_are_downloaded(place: Place) -> None:
    answer = place.get("data/plain.txt")
    assert (answer.status, answer.body) == (200, bytes(range(256)) * 40)
    headers = answer.headers
    assert headers["content-length"] == "10240" and headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"].startswith('attachment; filename="plain.txt"')
    page = place.get("data/page.html").headers
    assert page["content-type"] == "application/octet-stream"
    assert page["content-security-policy"].startswith("sandbox")
    odd = place.get("data/a%20%22b%22%3B%20%C3%A9%E2%80%A8.txt")
    assert odd.body == b"odd"
    assert odd.headers["content-disposition"] == (
        'attachment; filename="a _b__ __.txt"; '
        "filename*=UTF-8''a%20%22b%22%3B%20%C3%A9%E2%80%A8.txt"
    )


def test_parts_are_downloaded(place: Place) -> None:
    whole = place.get("data/plain.txt")
    for asked, found in (
        ("bytes=0-0", "0-0"),
        ("bytes=10-19", "10-19"),
        ("bytes=10200-", "10200-10239"),
        ("bytes=-5", "10235-10239"),
        ("bytes=-99999", "0-10239"),
        ("bytes=5-99999999", "5-10239"),
    ):
        part = place.get("data/plain.txt", Range=asked)
        first, last = map(int, found.split("-"))
        assert part.status == 206 and part.body == whole.body[first : last + 1]
        assert part.headers["content-range"] == f"bytes {found}/10240"
    for asked in ("bytes=10240-", "bytes=-0", "bytes=9-3"):
        part = place.get("data/plain.txt", Range=asked)
        assert part.status == 416 and part.headers["content-range"] == "bytes */10240"
    for asked in ("bytes=0-1,3-4", "bytes=-", "lines=1-2", "bytes=x"):
        assert place.get("data/plain.txt", Range=asked).status == 200
    tag, date = whole.headers["etag"], whole.headers["last-modified"]
    for condition, status in ((tag, 206), (date, 206), ('"other"', 200)):
        assert place.get("data/plain.txt", Range="bytes=1-2", If_Range=condition).status == status


def test_what_a_client_has_is_not_sent_again(place: Place) -> None:
    whole = place.get("data/plain.txt")
    tag, date = whole.headers["etag"], whole.headers["last-modified"]
    for headers, status in (
        ({"If_None_Match": tag}, 304),
        ({"If_None_Match": f'"x", W/{tag}'}, 304),
        ({"If_None_Match": '"x"', "If_Modified_Since": date}, 200),
        ({"If_Modified_Since": date}, 304),
        ({"If_Modified_Since": "Thu, 01 Jan 1970 00:00:00 GMT"}, 200),
        ({"If_Modified_Since": "yesterday"}, 200),
    ):
        answer = place.get("data/plain.txt", **headers)
        assert answer.status == status and (status == 200 or not answer.body)
    head = ask(place.port, "HEAD", "/files/data/plain.txt")
    assert (head.headers["content-length"], head.body) == ("10240", b"")


TRAVERSAL = [
    "data/../secret",
    "data/%2e%2e/secret",
    "data/%2e./secret",
    "data/%252e%252e/secret",
    "data/..%2fsecret",
    "data/..%5csecret",
    "data/..\\secret",
    "data/sub/../../secret",
    "data/%c0%ae%c0%ae/secret",
    "data/..%00/secret",
    "data/plain.txt%00.png",
    "data/plain.txt%0d%0aX-Evil:%201",
    "../secret",
    "data//plain.txt",
    "data/./plain.txt",
    "data/%2Fetc/passwd",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "data/.hidden",
    "data/%2ehidden",
    "data/plain.txt.",
    "data/plain.txt%20",
    "data/link",
    "data/inside",
    "data/out/secret",
    "data/out/",
    "data/pipe",
    "data/sub",
    "data-more/file",
    "datamore",
    "data%2Fplain.txt",
    "data/" + "a/" * 3000,
    "data/" + "a" * 300,
    "data/%ff",
    "data/plain.txt/more",
    "nowhere/plain.txt",
]


@pytest.mark.parametrize("path", TRAVERSAL, ids=range(len(TRAVERSAL)))
def test_nothing_else_is_downloaded(place: Place, path: str) -> None:
    with socket.create_connection(("127.0.0.1", place.port), DEADLINE) as connection:
        connection.sendall(f"GET /files/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = connection.recv(1 << 16)
    assert received[9:12] in (b"400", b"404", b"431") and SECRET not in received
    assert b"Evil" not in received.partition(b"\r\n\r\n")[0]


def test_listing(place: Place, wire: Wire) -> None:
    roots = place.get("").json()
    assert roots["entries"] == [
        {"name": "box", "kind": "root", "writable": True},
        {"name": "data", "kind": "root", "writable": False},
    ]
    listed = place.get("data/").json()
    assert wire.request(type="files-list", path="data")["data"] == listed
    assert [(entry["name"], entry["kind"], entry["size"]) for entry in listed["entries"]] == [
        ('a "b"; é\u2028.txt', "file", 3),
        ("page.html", "file", 25),
        ("plain.txt", "file", 10240),
        ("sub", "directory", 0),
    ]
    assert abs(listed["entries"][0]["modified"] / 1000 - place.data.stat().st_mtime) < 60
    assert listed["next"] is None
    names, after = [], ""
    while after is not None:
        page = place.get(f"data?list&limit=3&after={after}").json()
        names += [entry["name"] for entry in page["entries"]]
        after = page["next"]
    assert len(names) == 4
    for fields in ({"path": 1}, {"path": "data", "limit": 0}, {"path": "data", "after": 3}):
        assert wire.request(type="files-list", **fields)["code"] == "bad_request"
    assert place.get("data/?limit=x").status == 400
    assert wire.request(type="files-list", path="data/sub/nowhere")["code"] == "not_found"


def test_reading_over_the_socket(place: Place, wire: Wire) -> None:
    def read(**fields: Any) -> Any:
        return wire.request(type="files-read", **fields)

    assert read(path="data/plain.txt", offset=255, length=3).body == b"\xff\x00\x01"
    assert len(read(path="data/plain.txt").body) == 10240
    assert read(path="data/plain.txt", offset=99999).body == b""
    for path, code in (
        ("data/../secret", "bad_request"),
        ("data/.hidden", "not_found"),
        ("data/link", "not_found"),
        ("data/pipe", "not_found"),
        ("data/a\\b", "bad_request"),
        ("data", "not_found"),
        ("data/a%2fb", "not_found"),
        ("data/\ud800", "bad_request"),
    ):
        assert read(path=path)["code"] == code
    assert read(path="data/plain.txt", offset=-1)["code"] == "bad_request"
    assert read(path="data/plain.txt", length=1 << 30)["code"] == "bad_request"


def test_previews(place: Place, wire: Wire) -> None:
    """The database is locked (--sandbox); previews are read all the same."""
    table = pa.table({"n": range(1000), "s": [str(n) for n in range(1000)]})
    pyarrow.parquet.write_table(table, place.box / "t.parquet")
    (place.box / "t.ndjson").write_text("".join(json.dumps({"n": n}) + "\n" for n in range(9)))
    (place.box / "it's.csv").write_text("n,t\n1,2020-01-01\n")
    (place.box / "broken.parquet").write_bytes(b"PAR1 no")

    def preview(path: str, **fields: Any) -> Any:
        return wire.request(type="files-preview", path=path, **fields)

    reply = preview("box/t.parquet", limit=3, offset=500)
    assert isinstance(reply, Arrow) and reply.table().to_pylist()[0] == {"n": 500, "s": "500"}
    assert reply.table().num_rows == 3
    assert preview("data/sub/deep.csv").table().to_pylist()[1] == {"a": 2, "b": "y"}
    data = preview("box/it's.csv", format="json")["data"]
    assert data["columns"] == [{"name": "n", "type": "BIGINT"}, {"name": "t", "type": "DATE"}]
    assert json.loads(data["rows"]) == [{"n": 1, "t": 1577836800000}]
    assert preview("box/t.ndjson", format="json", limit=0)["data"]["rows"] == "[]"
    assert preview("box/broken.parquet")["code"] == "query_error"
    for path, code in (("data/plain.txt", "bad_request"), ("data/out/x.csv", "not_found")):
        assert preview(path)["code"] == code
    assert preview("box/t.parquet", limit=10**6)["code"] == "bad_request"
    assert preview("box/t.parquet", format="xml")["code"] == "bad_request"
    # Two files that look the same from outside are not taken for each other.
    for number in range(6):
        pyarrow.parquet.write_table(pa.table({"n": [number]}), place.box / f"{number}.parquet")
        os.utime(place.box / f"{number}.parquet", (1, 1))
    for number in (0, 1, 2, 0, 3, 4, 5):
        assert preview(f"box/{number}.parquet").table().to_pylist() == [{"n": number}]
    # What a preview may do, a client may not.
    reply = wire.request(type="json", sql=f"from '{place.box}/t.parquet'", queryId="q")
    assert reply["code"] == "forbidden"


def test_uploads(place: Place, wire: Wire) -> None:
    before = place.left()
    data = os.urandom(1 << 20)
    answer = ask(place.port, "PUT", "/files/box/in/new.bin", data)
    assert answer.status == 201
    assert answer.json() | {"modified": 0} == {
        "name": "new.bin", "kind": "file", "size": 1 << 20, "modified": 0,
    }  # fmt: skip
    assert place.get("box/in/new.bin").body == data
    assert place.get("box/in/new.bin", If_None_Match=answer.headers["etag"]).status == 304
    answer = ask(place.port, "PUT", "/files/box/in/new.bin", (b"chunk" for _ in range(3)))
    assert answer.status == 200 and place.get("box/in/new.bin").body == b"chunk" * 3
    assert ask(place.port, "PUT", "/files/box/in/new.bin", b"x", If_None_Match="*").status == 409
    assert ask(place.port, "PUT", "/files/box/in/empty", b"", If_None_Match="*").status == 201
    too_large = (b"x" * 100_000 for _ in range(30))
    for body in (b"x" * ((1 << 20) + 1), too_large):
        answer = ask(place.port, "PUT", "/files/box/in/large", body)
        assert answer.status == 413 and b"--max-file-size" in answer.body
    for path, status in (
        ("data/new", 403),
        ("box/nowhere/new", 404),
        ("box/in", 409),
        ("box/in/", 400),
        ("box", 400),
        ("box/../data/new", 400),
        ("box/.new", 404),
        ("box/a%5cb", 400),
    ):
        assert ask(place.port, "PUT", f"/files/{path}", b"x").status == status
    (place.box / "in" / "link").symlink_to(place.directory / "secret")
    assert ask(place.port, "PUT", "/files/box/in/link", b"x").status == 409
    assert (place.directory / "secret").read_bytes() == SECRET
    (place.box / "in" / "link").unlink()
    for name in ("new.bin", "empty"):
        assert ask(place.port, "DELETE", f"/files/box/in/{name}").status == 204
    assert place.left() == before


def test_directories(place: Place, wire: Wire) -> None:
    before = place.left()
    assert ask(place.port, "POST", "/files/box/made?mkdir").status == 201
    assert ask(place.port, "POST", "/files/box/made/deep/?mkdir").status == 201
    assert ask(place.port, "POST", "/files/box/made?mkdir").status == 409
    assert ask(place.port, "POST", "/files/box/made").status == 400
    assert ask(place.port, "DELETE", "/files/box/made").status == 409
    assert wire.request(type="files-mkdir", path="box/made/more")["type"] == "ok"
    assert wire.request(type="files-mkdir", path="data/made")["code"] == "forbidden"
    for path in ("box/made/more", "box/made/deep", "box/made"):
        assert wire.request(type="files-delete", path=path)["type"] == "ok"
    assert wire.request(type="files-delete", path="box/made")["code"] == "not_found"
    assert wire.request(type="files-delete", path="box")["code"] == "forbidden"
    assert wire.request(type="files-delete", path="data/plain.txt")["code"] == "forbidden"
    assert place.left() == before


def half_an_upload(port: int, path: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), DEADLINE)
    head = f"PUT /files/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500000\r\n\r\n"
    connection.sendall(head.encode() + b"x" * 250_000)
    return connection


def descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    found = []
    for number in os.listdir(folder):
        try:
            found.append(os.readlink(f"{folder}/{number}"))
        except FileNotFoundError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at open files in /proc")
def test_an_upload_that_breaks_off_leaves_nothing(place: Place) -> None:
    before = place.left()

    def is_open() -> bool:
        return any(str(place.box) in path for path in descriptors(os.getpid()))

    def wait_for(wanted: bool) -> None:
        for _ in range(int(DEADLINE / 0.005)):
            if is_open() == wanted:
                return
            threading.Event().wait(0.005)
        raise AssertionError("The file is still as it was.")

    for _ in range(20):
        connection = half_an_upload(place.port, "box/in/half")
        wait_for(True)
        assert ask(place.port, "GET", "/files/box/in/half").status == 404
        connection.close()
        wait_for(False)
    assert place.left() == before


def test_a_kill_leaves_nothing_that_stays(
    serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    (tmp_path / ".sqlrooms-upload-0123").write_text("of a file system without nameless files")
    server = serve("--files", f"box={tmp_path}:rw")
    connection = half_an_upload(server.port, "box/half")
    if Path("/proc/self/fd").is_dir():
        while not any("(deleted)" in path for path in descriptors(server.pid)):
            threading.Event().wait(0.005)
    server.stop(signal.SIGKILL)
    connection.close()
    server = serve("--files", f"box={tmp_path}:rw")
    assert ask(server.port, "PUT", "/files/box/whole", b"x").status == 201
    assert os.listdir(tmp_path) == ["whole"]


def test_roles(tmp_path: Path, launch: Callable[..., LocalServer]) -> None:
    names = ("data/a", "home/ada/mine", "home/bob/his", "box/in/old", "box/out/old")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    entries = [
        f'[tokens."{user}"]\nrole = "{role}"\nhash = "sha256:{sha256(user.encode()).hexdigest()}"\n'
        for user, role in (
            ("ada", "reader"),
            ("ada/mine", "reader"),
            ("wim", "writer"),
            ("nil", "nothing"),
            ("root", "admin"),
        )
    ]
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(TOKENS.replace("{{", "{").replace("}}", "}") + "\n".join(entries))
    roots = tuple(f"{name}={tmp_path / name}:rw" for name in ("data", "home", "box"))
    local = launch(files=roots, tokens=str(tokens))

    def status(user: str, method: str, path: str) -> int:
        body = b"x" if method == "PUT" else None
        token = {"Authorization": f"Bearer {user}"} if user else {}
        return ask(local.port, method, f"/files/{path}", body, **token).status

    for user, allowed in (
        ("ada", {"data/a", "data/", "home/ada/mine", "home/ada/"}),
        ("ada/mine", {"data/a", "data/"}),
        ("wim", {"box/", "box/in/old", "box/out/old"}),
        ("nil", set()),
    ):
        for path in (*names, "data/", "home/", "home/ada/", "home/bob/", "box/"):
            assert status(user, "GET", path) == (200 if path in allowed else 403), (user, path)
    assert status("", "GET", "data/a") == 401
    assert status("ada", "PUT", "data/a") == status("ada", "DELETE", "data/a") == 403
    assert status("wim", "PUT", "box/in/new") == 201
    assert status("wim", "PUT", "box/out/new") == status("wim", "DELETE", "box/out/old") == 403
    assert status("wim", "POST", "box/in/deep?mkdir") == 201
    assert status("root", "DELETE", "home/bob/his") == 204
    with local.connect("/?token=ada") as wire:
        roots_seen = wire.request(type="files-list")["data"]["entries"]
        assert [entry["name"] for entry in roots_seen] == ["data"]
        assert wire.request(type="files-read", path="box/in/new")["code"] == "forbidden"
        assert wire.request(type="files-preview", path="home/bob/x.csv")["code"] == "forbidden"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("{0}", "NAME=DIR"),
        ("a b={0}", "NAME=DIR"),
        ("a={0}/nowhere", "--files a: .* is no directory"),
        ("a={0},a={0}", "two directories of the name 'a'"),
        ("a={0}:rw,b={0}/file", "--files b: .* is no directory"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, given: str, text: str) -> None:
    (tmp_path / "file").write_text("")
    from sqlrooms_server.server import Server

    with pytest.raises(StartupError, match=text):
        Server(Settings(files=tuple(given.format(tmp_path).split(","))))


def test_files_of_the_server_are_not_served(tmp_path: Path) -> None:
    from sqlrooms_server.server import Server

    database = str(tmp_path / "deep" / "my.duckdb")
    for settings in ({"files": (f"a={tmp_path}",)}, {"static": str(tmp_path)}):
        with pytest.raises(StartupError, match=r"holds the database .*my\.duckdb"):
            Server(Settings(db_path=database, **settings))
