"""The command `slotkeeper`: the list of its commands. Each command lives in a module of its own here.

Rules
- A command's module is imported when that command runs, so `slotkeeper --help` and completion load click and nothing else.
  The one-line help of each command therefore stands in `COMMANDS`; a test holds it equal to the command's own.
- What a command prints for people goes to standard output, progress and errors to standard error. With `--json` standard
  output is exactly one JSON document, also for a failure.
- Exit codes are those of `api.cli.exits`, nowhere else.
- A command that asks a running service knows only its URL; a command that works on a data directory needs no service.

Not promised: that the text for people stays as it is. Scripts use `--json` and exit codes.
"""

import importlib
from typing import Any, Final, NamedTuple

import click

from engine.version import __version__


class Entry(NamedTuple):
    """Where a command is, and what `--help` of the program says of it."""

    module: str
    attribute: str
    help: str


COMMANDS: Final[dict[str, Entry]] = {
    "demo": Entry("api.cli.demo", "demo", "Run an engine with two weeks of slots to try things on."),
    "init": Entry("api.cli.init", "init", "Make a data directory."),
    "serve": Entry("api.cli.serve", "serve", "Serve a data directory until SIGTERM or Ctrl-C."),
    "status": Entry("api.cli.status", "status", "Show how a running service does, shard by shard."),
    "pools": Entry("api.cli.pools", "pools", "List the pools of a running service."),
    "import": Entry("api.cli.import_counters", "import_counters", "Define many counters from a CSV file."),
    "verify": Entry("api.cli.verify", "verify", "Prove a data directory from its journals."),
    "config": Entry("api.cli.config", "config", "Look at the configuration."),
}
"""In the order in which somebody new meets them."""


class Program(click.Group):
    """A group that imports a command when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        del ctx
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: Any = getattr(importlib.import_module(entry.module), entry.attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.module}.{entry.attribute} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try `slotkeeper demo` first. Exit codes and completion of bash, zsh and fish: docs/cli.md.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Delivery-slot capacity: the one place that says yes or no, durable, never overbooked."""


def main() -> None:
    """The command `slotkeeper`."""
    cli(prog_name="slotkeeper")
