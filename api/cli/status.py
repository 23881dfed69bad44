"""`slotkeeper status`: how a running service does."""

import click

from api.cli import options, output
from api.cli.client import Service
from api.cli.exits import Exit, write_json


@click.command()
@options.url
@options.as_json
def status(url: str, *, as_json: bool) -> None:
    """Show how a running service does, shard by shard.

    Exit code 0 when every shard takes reservations, 1 when one does not.
    """
    with Service(url) as service:
        found = service.get("/v1/status")
    if as_json:
        write_json(found)
    else:
        columns = ("shard", "state", "ready", "position", "counters", "heartbeat ms", "epoch", "restarts")
        names = ("shard", "state", "ready", "position", "counters", "heartbeat_age_ms", "epoch", "restarts")
        output.table(columns, ([shard[name] for name in names] for shard in found["shards"]))
        ready = "ready" if found["ready"] else "NOT READY"
        click.echo(
            f"\n{ready}: {url}, version {found['version']}, pools {found['pools']}, plan {found['plan_version']}"
        )
    raise SystemExit(Exit.OK if found["ready"] else Exit.REFUSED)
