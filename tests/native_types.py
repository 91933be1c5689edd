"""The types of the native library, from their declarations in C. `python -m tests.native_types`
renews them.

A server that parses the declarations itself needs a sixth of its start for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cffi

TRANSPORT = Path(__file__).parent.parent / "sqlrooms_server" / "transport"
DECLARATIONS = TRANSPORT / "native.h"
MODULE = TRANSPORT / "native_types.py"

HEAD = '''"""Made of native.h by python -m tests.native_types."""

# mypy: ignore-errors
'''


def made() -> str:
    ffi = cffi.FFI()
    ffi.cdef(DECLARATIONS.read_text(encoding="utf-8"))
    ffi.set_source("sqlrooms_server.transport.native_types", None)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "types.py"
        ffi.emit_python_code(str(path))
        _, _, text = path.read_text(encoding="utf-8").partition("\n")
    return HEAD + text


if __name__ == "__main__":
    MODULE.write_text(made(), encoding="utf-8")
