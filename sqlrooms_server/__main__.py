"""``python -m sqlrooms_server``."""

import sys

from sqlrooms_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
