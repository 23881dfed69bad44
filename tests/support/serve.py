"""The real supervisor with a given configuration: python -m tests.support.serve DATA CONFIG.

`slotkeeper serve` reads the same configuration from options and a file for people; tests say all of it, and get exactly it.
"""

import sys
from pathlib import Path

from engine import config
from engine.supervisor import serve

if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), config.decode(Path(sys.argv[2]).read_bytes())))
