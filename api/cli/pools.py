"""`slotkeeper pools`: what pools there are."""

from typing import Any

import click

from api.cli import options, output
from api.cli.client import Service
from api.cli.exits import write_json


@click.command()
@options.url
@options.as_json
def pools(url: str, *, as_json: bool) -> None:
    """List the pools of a running service."""
    with Service(url) as service:
        found = service.get("/v1/pools")
    if as_json:
        write_json(found)
        return
    if not found["pools"]:
        click.echo("There are no pools yet. Define one with PUT /v1/pools/{pool_id}; /docs shows how.")
        return
    output.table(
        ("pool", "capacity type", "unit", "zone", "time zone", "cut-off"),
        (
            (
                pool["pool_id"],
                pool["capacity_type"],
                pool["unit"],
                pool["zone"],
                pool["time_zone"],
                _cutoff(pool["cutoff"]),
            )
            for pool in found["pools"]
        ),
    )


def _cutoff(rule: dict[str, Any] | None) -> str:
    if rule is None:
        return "when the slot ends"
    if rule.get("minutes_before") is not None:
        return f"{rule['minutes_before']} min before"
    days = rule["days_before"]
    day = {0: "that day", 1: "the day before"}.get(days, f"{days} days before")
    return f"{rule['local_time']} {day}"
