"""How the command line ends: exit codes in one table, and the failure that carries one.

The numbers above 63 are those of sysexits.h, which systemd and scripts know. docs/cli.md shows the same table; a test
compares them.
"""

import json
from enum import IntEnum
from typing import IO, Any, Final

import click


class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNAVAILABLE = 69
    SYSTEM = 71
    TRY_AGAIN = 75
    UNUSABLE = 78


MEANINGS: Final[dict[Exit, str]] = {
    Exit.OK: "Done, and what was asked is so.",
    Exit.REFUSED: "The check failed or the service refused; also an interrupted or failed command.",
    Exit.USAGE: "The command line is not understood.",
    Exit.UNAVAILABLE: "No Slotkeeper answers at the URL.",
    Exit.SYSTEM: "The operating system refused what is needed, such as the listening address.",
    Exit.TRY_AGAIN: "The service cannot do it now. Try again.",
    Exit.UNUSABLE: "The configuration or the data directory cannot be used.",
}


def write_json(document: object) -> None:
    """The one JSON document of a command, on standard output."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


class Failure(click.ClickException):
    """A command that ends with something else than 0. `message` says whose fault it is and what to do next.

    With `--json` standard output has `{"ok": false, "exit_code": …, "error": …}` and `members` besides.
    """

    def __init__(self, exit_code: Exit, message: str, **members: object) -> None:
        super().__init__(message)
        self.exit_code = int(exit_code)  # type: ignore[misc]  # click reads it from the instance
        self._members = members
        # It is shown after click has left the command's context, so it is asked here.
        context = click.get_current_context(silent=True)
        self._as_json = context is not None and bool(context.params.get("as_json"))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        if self._as_json:
            write_json({"ok": False, "exit_code": self.exit_code, "error": self.message, **self._members})
        click.echo(f"slotkeeper: {self.message}", err=True, file=file)
