"""Streams that go on after a lost connection."""

from __future__ import annotations

import random

import pytest

from tests.conftest import LocalServer
from tests.cutting import CuttingProxy
from tests.resumer import Resumer
from tests.streams import stream

# 12 MB.
BIG = "select i, i * 2 as j from range(800000) t(i)"


@pytest.fixture(scope="module")
def server():
    from sqlrooms_server.settings import Settings
    local = LocalServer(Settings(port=0, resume_window=4 << 20))
    yield local
    local.server.stop()


@pytest.mark.parametrize("seed", range(5))
def test_cut(server, seed):
    choose = random.Random(seed)
    budgets = [choose.randrange(2000, 2_000_000) for _ in range(30)]
    with server.connect() as wire, CuttingProxy(server.port, budgets) as proxy:
        whole = stream(wire, BIG)
        resumer = Resumer(proxy.url)
        resumer.ask(BIG, window=1<<20)
        resumer.finish()
        assert resumer.answer is None
        assert resumer.body == whole.body
        print(proxy.cuts, resumer.attempts)
        resumer.close()
