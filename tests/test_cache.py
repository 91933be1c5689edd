"""The cache of results: memory, disk, what is evicted, and what survives a restart."""

from __future__ import annotations

import gc
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sqlrooms_server.cache import Entry, Overflow, ResultCache, fingerprint
from sqlrooms_server.cache.entries import SMALL_BYTES
from sqlrooms_server.cache.memory import OVERHEAD_BYTES
from sqlrooms_server.errors import StartupError

SIZE = 64 << 20
STATE = {"version": 7, "tables": [["main", 3]]}

Make = Callable[..., ResultCache]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Caches below the directory of the test."""
    made = []

    def make(
        size: int = SIZE, *, name: str = "/data/some.db", known: Any = None, directory: str = ""
    ) -> ResultCache:
        cache = ResultCache(directory or str(tmp_path / "cache"), size, name=name)
        made.append(cache)
        cache.recover(known)
        return cache

    yield make
    for cache in made:
        cache.close(None)


def entry_of(cache: ResultCache, *chunks: bytes | memoryview, token: Any = (1, "a")) -> Entry:
    spool = cache.spool()
    for chunk in chunks:
        spool.append(chunk)
    return spool.finish(token, {"rows": len(chunks)})


def body(entry: Entry | None) -> bytes:
    assert entry is not None
    return b"".join(entry.chunks())


def leaf(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def on_disk(directory: Path) -> int:
    return sum(
        os.lstat(os.path.join(path, name)).st_blocks * 512
        for path, folders, files in os.walk(directory)
        for name in [*folders, *files]
    )


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_small_result_is_found_in_memory_and_after_that_on_disk(make: Make) -> None:
    cache = make()
    stored = entry_of(cache, b"one", memoryview(b"two"), token=[[1, ["t"]], None])
    assert cache.find(("q",)) is None
    cache.store(("q",), stored)
    assert cache.peek(("q",)) is stored
    cache.flush()
    cache.discard(("q",))
    assert cache.peek(("q",)) is None
    found = cache.find(("q",))
    assert found is not None and found is not stored
    assert (found.token, found.facts, found.size) == (stored.token, stored.facts, 6)
    assert found.token == ((1, ("t",)), None)
    assert found.body == b"onetwo"
    assert cache.peek(("q",)) is found
    assert cache.find(("q", None)) is None


def test_an_empty_result_is_a_result(make: Make) -> None:
    cache = make()
    cache.store(("q",), entry_of(cache))
    cache.flush()
    cache.discard(("q",))
    assert body(cache.find(("q",))) == b""


def test_pieces_of_a_large_result_stay_apart(make: Make) -> None:
    cache = make()
    chunks = [os.urandom(length) for length in (1, 700_000, 1, 500_000, 2_000_000, 3)]
    stored = entry_of(cache, *chunks)
    assert stored.body is None
    assert list(stored.chunks()) == chunks
    cache.store(("q",), stored)
    assert cache.peek(("q",)) is None
    assert cache.find(("q",)) is not None, "it waits to be written"
    cache.flush()
    found = cache.find(("q",))
    assert found is not None and found is not stored
    assert found.body is None and list(found.chunks()) == chunks
    first, second = found.chunks(), found.chunks()
    assert [next(first), next(second), next(first), next(second)] == [*chunks[:1] * 2] + [
        chunks[1]
    ] * 2


def test_the_later_of_two_results_is_kept(make: Make) -> None:
    cache = make()
    for content in (b"a" * 2_000_000, b"b", b"c" * 40_000, b"d" * 2_000_000):
        cache.store(("q",), entry_of(cache, content))
        assert body(cache.find(("q",))) == content
        cache.flush()
        cache.discard(("q",))
        assert body(cache.find(("q",))) == content


def test_memory_keeps_what_was_used_last(make: Make) -> None:
    cache = make(size=4 * 10 * (10_000 + OVERHEAD_BYTES))
    for number in range(10):
        cache.store((number,), entry_of(cache, bytes(10_000)))
    assert cache.peek((0,)) is not None
    cache.store((10,), entry_of(cache, bytes(10_000)))
    assert [cache.peek((number,)) is not None for number in range(11)] == [
        True,
        False,
        *[True] * 9,
    ]
    assert cache.sizes()["memoryBytes"] <= 10 * (10_000 + OVERHEAD_BYTES)


def test_a_result_that_is_too_large_is_refused_early(make: Make, tmp_path: Path) -> None:
    cache = make(size=8 << 20)
    spool = cache.spool()
    spool.append(bytes(1_500_000))
    with pytest.raises(Overflow):
        spool.append(bytes(100_000))
    with pytest.raises(Overflow):
        spool.append(b"")
    with pytest.raises(Overflow):
        spool.finish(None, {})
    spool.close()
    spool.close()


@pytest.mark.parametrize("size", [0, 1, 3000, 100_000])
def test_a_tiny_cache_works_without_a_disk(make: Make, tmp_path: Path, size: int) -> None:
    cache = make(size=size)
    cache.store(("e",), entry_of(cache))
    try:
        cache.store(("q",), entry_of(cache, b"x" * 1000))
    except Overflow:
        assert size < 100_000
    cache.flush()
    assert (cache.find(("q",)) is not None) == (size == 100_000)
    assert cache.sizes()["memoryBytes"] <= size // 4
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("length", [3_000, 50_000, 1_400_000])
def test_the_directory_stays_within_its_size(make: Make, tmp_path: Path, length: int) -> None:
    size = 8 << 20
    cache = make(size=size)
    stored = entry_of(cache, bytes(length))
    count = min(1500, 10 * size // length)
    for number in range(count):
        cache.store((number,), stored)
        if number % 10 == 0:
            cache.flush()
    cache.flush()
    assert on_disk(tmp_path) <= size
    assert cache.sizes()["diskBytes"] <= size
    cache.discard((count - 1,))
    assert body(cache.find((count - 1,))) == bytes(length), "the last one is never evicted"
    if length * count > size:
        assert cache.find((0,)) is None


def test_what_is_being_read_survives_its_eviction(make: Make) -> None:
    cache = make(size=16 << 20)
    content = [os.urandom(400_000) for _ in range(6)]
    cache.store(("q",), entry_of(cache, *content))
    cache.flush()
    found = cache.find(("q",))
    assert found is not None
    chunks = found.chunks()
    read = [next(chunks)]
    for number in range(8):
        cache.store((number,), entry_of(cache, bytes(2_000_000)))
        cache.flush()
    assert cache.find(("q",)) is None
    assert read + list(chunks) == content


def test_many_threads_at_once(make: Make) -> None:
    cache = make(size=8 << 20)
    contents = [bytes([number]) * (5_000 if number % 2 else 90_000) for number in range(40)]
    wrong = []

    def use(start: int) -> None:
        for step in range(120):
            number = (start + step) % 40
            found = cache.find((number,))
            if found is None:
                cache.store((number,), entry_of(cache, contents[number]))
            elif body(found) != contents[number]:
                wrong.append(number)
            if step % 7 == 0:
                cache.discard((number,))
            cache.peek((number,))

    threads = [threading.Thread(target=use, args=(start,)) for start in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_lock_on_the_database_is_not_waited_for(make: Make, tmp_path: Path) -> None:
    cache = make()
    cache.store(("q",), entry_of(cache, b"x"))
    cache.flush()
    cache.discard(("q",))
    other = sqlite3.connect(leaf(tmp_path / "cache") / "cache.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    done = threading.Event()

    def use() -> None:
        assert body(cache.find(("q",))) == b"x"
        cache.store(("r",), entry_of(cache, b"y"))
        assert body(cache.find(("r",))) == b"y"
        done.set()

    threading.Thread(target=use).start()
    # The writer waits for a second before it gives up.
    assert done.wait(0.9)
    other.execute("ROLLBACK")
    other.close()
    cache.flush()


def test_descriptors_are_given_back(make: Make) -> None:
    cache = make(size=256 << 20)
    stored = [entry_of(cache, bytes(SMALL_BYTES), bytes(100)) for _ in range(30)]
    for number, entry in enumerate(stored):
        cache.store((number,), entry)
    cache.flush()
    del stored, entry
    cache.find((0,))
    before = descriptors()
    kept = [cache.find((number % 30,)) for number in range(200)]
    assert all(kept) and descriptors() >= before + 200
    spools = [cache.spool() for _ in range(20)]
    for spool in spools:
        spool.append(bytes(SMALL_BYTES + 1))
    del kept, spools, spool
    assert descriptors() == before


def test_nothing_is_created_before_it_is_needed(make: Make, tmp_path: Path) -> None:
    code = "import sys, sqlrooms_server.cache; sys.exit('diskcache' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    cache = make()
    assert cache.find(("q",)) is None
    assert cache.peek(("q",)) is None
    assert set(cache.sizes().values()) == {0}
    cache.close({"a": 1}, STATE)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_is_private(make: Make, tmp_path: Path) -> None:
    cache = make()
    entry_of(cache, bytes(2_000_000))
    path = leaf(tmp_path / "cache")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    cache.close(None)
    (path / "planted").write_text("x")
    path.chmod(0o777)
    entry_of(make(), bytes(2_000_000))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not (path / "planted").exists()


def test_the_default_directory(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    first = ResultCache("", SIZE, name="/data/some.db")
    assert first.recover(None) is None
    entry_of(first, bytes(2_000_000))
    path = leaf(tmp_path / "sqlrooms-server")
    first.close(None)
    # Somebody else's: another place is taken.
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    second = ResultCache("", SIZE, name="/data/some.db")
    assert second.recover(None) is None
    entry_of(second, bytes(2_000_000))
    assert "belongs to another user" in caplog.text
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    second.close({"a": 1}, STATE)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert path.exists()


def test_a_directory_that_was_named_must_be_ours(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_of(make(), bytes(2_000_000))
    path = leaf(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: os.getuid() + 1)
        with pytest.raises(StartupError, match=f"{path}: it belongs to another user; .*cache-dir"):
            make()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartupError, match="is not a directory"):
        make()
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="file is not a directory"):
        make(directory=str(tmp_path / "file" / "below"))


def test_of_two_servers_one_has_the_directory(make: Make, tmp_path: Path) -> None:
    first, second = make(), make()
    for cache, content in ((first, b"1" * 2_000_000), (second, b"2" * 2_000_000)):
        cache.store(("q",), entry_of(cache, content))
        cache.flush()
    assert body(first.find(("q",))) == b"1" * 2_000_000
    assert body(second.find(("q",))) == b"2" * 2_000_000
    assert len(list((tmp_path / "cache").iterdir())) == 2
    second.close({"a": 2}, "second")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    first.close({"a": 1}, "first")
    again = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    assert again.recover({"a": 1}) == "first"
    again.close(None)


def test_a_database_in_memory_leaves_nothing(make: Make, tmp_path: Path) -> None:
    cache = make(name=":memory:")
    cache.store(("q",), entry_of(cache, bytes(2_000_000)))
    cache.flush()
    assert cache.find(("q",)) is not None
    assert leaf(tmp_path / "cache").name.startswith("sqlrooms-cache-")
    cache.close({"a": 1}, STATE)
    assert list((tmp_path / "cache").iterdir()) == []
    assert fingerprint(":memory:", {}) is None


CHILD = """
import sys
from sqlrooms_server.cache import ResultCache
cache = ResultCache(sys.argv[1], 64 << 20, name=sys.argv[2])
print(cache.recover({"a": 1}))
for number in range(3):
    spool = cache.spool()
    spool.append(bytes(2_000_000))
    cache.store((number,), spool.finish(None, {}))
cache.flush()
print("ready", flush=True)
sys.stdin.read()
cache.close({"a": 1}, "state")
"""


def child(directory: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            return process
    raise AssertionError("The process ended.")


def test_a_killed_process_leaves_nothing_to_the_next(make: Make, tmp_path: Path) -> None:
    ended = child(tmp_path / "cache", "/data/some.db")
    ended.communicate("")
    assert ended.returncode == 0
    # It recovers what the first one left, and loses it.
    for name in ("/data/some.db", ":memory:"):
        with child(tmp_path / "cache", name) as killed:
            killed.send_signal(signal.SIGKILL)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    cache = ResultCache(str(tmp_path / "cache"), SIZE, name="/data/some.db")
    assert cache.recover({"a": 1}) is None
    path = leaf(tmp_path / "cache"), "the directory of the one in memory is gone"
    assert cache.find((1,)) is None
    entry_of(cache, bytes(2_000_000))
    assert sorted(os.listdir(path[0])) == ["lock"]
    cache.close(None)
