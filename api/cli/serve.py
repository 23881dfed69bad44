"""`slotkeeper serve`: be the supervisor of a data directory. The one command that imports the engine's shells."""

from pathlib import Path

import click

from api.cli.exits import Exit, Failure
from engine import config as configuration
from engine import supervisor
from engine.datadir import DataDirectoryError
from engine.systemd import SystemdError


@click.command()
@click.option(
    "--data",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The data directory, made by `slotkeeper init`.",
)
@click.option("--listen", metavar="HOST:PORT", help="server.listen, over what the file says.")
@click.option("--api", "api_processes", metavar="N", type=int, help="server.api_processes, over what the file says.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A TOML file; without one everything has its default.",
)
def serve(data: Path, listen: str | None, api_processes: int | None, config_file: Path | None) -> None:
    """Serve a data directory until SIGTERM or Ctrl-C.

    It is ready when /readyz answers 200. Log lines go to standard error. A second Ctrl-C does not wait for requests.
    """
    overrides = {"server.listen": listen, "server.api_processes": api_processes}
    try:
        config = configuration.load(config_file, overrides)
    except configuration.ConfigError as error:
        raise Failure(Exit.UNUSABLE, "\n".join(["the configuration cannot be used:", *error.problems])) from None
    try:
        exit_code = supervisor.serve(data, config)
    except (DataDirectoryError, SystemdError) as error:
        raise Failure(Exit.UNUSABLE, str(error)) from None
    except supervisor.ListenError as error:
        raise Failure(Exit.SYSTEM, str(error)) from None
    raise SystemExit(exit_code)
