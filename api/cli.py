"""The command `slotkeeper`."""

import click

from engine import config as configuration
from engine import datadir
from engine.supervisor import serve as supervise
from pathlib import Path


@click.group()
def cli() -> None:
    """x"""


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--shards", type=int, default=2)
def init(directory: Path, shards: int) -> None:
    datadir.init(directory, shards)


@cli.command()
@click.option("--data", type=click.Path(path_type=Path))
@click.option("--listen")
def serve(data: Path, listen: str | None) -> None:
    raise SystemExit(supervise(data, configuration.load(None, {"server.listen": listen} if listen else {})))
