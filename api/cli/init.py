"""`slotkeeper init`: make a data directory."""

from pathlib import Path

import click
import msgspec

from api.cli import options
from api.cli.exits import Exit, Failure, write_json
from engine import datadir
from engine.config import cores
from engine.core.limits import SHARDS_MAX


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--shards",
    type=click.IntRange(1, SHARDS_MAX),
    help="Number of shards, fixed from now on.  [default: number of cores]",
)
@options.as_json
def init(directory: Path, shards: int | None, *, as_json: bool) -> None:
    """Make a data directory.

    DIR and its parents may be missing; a directory in which anything else lies is refused. The number of shards is the
    number of workers that decide at the same time, and cannot be changed later.
    """
    try:
        metadata = datadir.init(directory, shards or cores())
    except datadir.DataDirectoryError as error:
        raise Failure(Exit.UNUSABLE, str(error)) from None
    if as_json:
        write_json({"ok": True, "directory": str(directory.resolve()), **msgspec.structs.asdict(metadata)})
    else:
        noun = "shard" if metadata.shards == 1 else "shards"
        click.echo(f"{directory}: ready, {metadata.shards} {noun}. Next: slotkeeper serve --data {directory}")
