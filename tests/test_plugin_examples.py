"""The complete examples of docs/plugins.md: what the page shows is what the files are and do."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ServerProcess
from tests.wire import DEADLINE

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if not path.stem.endswith("_client"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_the_page_says(
    serve: Callable[..., ServerProcess], tmp_path: Path, name: str
) -> None:
    plugin = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    client = (EXAMPLES / f"{name}_client.py").read_text(encoding="utf-8")
    texts = (re.escape(f"```python\n{text}```") for text in (plugin, client))
    shown = re.search(".*?".join(texts) + r"\s+prints\s+```\n(.*?)```", PAGE, re.S)
    assert shown is not None, f"docs/plugins.md does not show {name}.py and its client"
    (tmp_path / f"{name}.py").write_text(plugin, encoding="utf-8")
    server = serve("--plugin", f"{name}.py", cwd=tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", client.replace("ws://localhost:4000", server.url)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == (shown[1], "")


def test_there_are_three() -> None:
    assert len(NAMES) == 3
