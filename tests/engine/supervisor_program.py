"""The real supervisor with children of `child_program.py`: python supervisor_program.py DATA CONFIG."""

import json
import os
import sys
from pathlib import Path

import msgspec

from engine.child import ChildArguments
from engine.config import load
from engine.supervisor import serve

CHILD = Path(__file__).with_name("child_program.py")


def argv_for(arguments: ChildArguments) -> list[str]:
    """Tells the moment before each start."""
    os.write(1, f"spawn {arguments.role} {arguments.index}\n".encode())
    behaviour = json.loads(os.environ["SLOTKEEPER_TEST_BEHAVIOUR"])
    if behaviour.get(f"{arguments.role} {arguments.index}") == "no_such_program":
        return ["/nonexistent/program"]
    return [sys.executable, str(CHILD), *arguments.to_argv()]


if __name__ == "__main__":
    try:
        config = load(Path(sys.argv[2]))
        if ready_seconds := os.environ["SLOTKEEPER_TEST_READY_SECONDS"]:
            # Shorter than an operator may ask for: a test waits for it.
            runtime = msgspec.structs.replace(config.runtime, ready_seconds_max=float(ready_seconds))
            config = msgspec.structs.replace(config, runtime=runtime)
        sys.exit(serve(Path(sys.argv[1]), config, argv_for=argv_for))
    except Exception as error:  # noqa: BLE001 - the test wants the text
        os.write(1, f"refused {type(error).__name__} {error}\n".encode())
        sys.exit(2)
