"""`slotkeeper config`: whether the configuration can be used, and what it comes to."""

from pathlib import Path

import click
import msgspec

from api.cli import options
from api.cli.exits import Exit, Failure, write_json
from engine import config as configuration
from engine.config import Config


@click.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@click.argument("file", metavar="[FILE]", type=click.Path(path_type=Path), required=False)
@click.option("--print", "show", is_flag=True, help="Print every key with its effective value and meaning, as TOML.")
@options.as_json
def check(file: Path | None, *, show: bool, as_json: bool) -> None:
    """Say whether a configuration file can be used, with all its problems at once.

    Without FILE it is about the defaults: `slotkeeper config check --print > slotkeeper.toml` begins a file.
    """
    try:
        found = configuration.load(file)
    except configuration.ConfigError as error:
        raise Failure(Exit.UNUSABLE, "\n".join(error.problems), problems=error.problems) from None
    if as_json:
        write_json({"ok": True, "config": msgspec.to_builtins(found)})
    elif show:
        click.echo(as_toml(found), nl=False)
    else:
        click.echo(f"{'the defaults' if file is None else file}: can be used")


def as_toml(found: Config) -> str:
    """The effective configuration as a file that means the same. A key without a value stands as a comment."""
    lines: list[str] = []
    section = ""
    for setting in configuration.describe():
        of, _, name = setting.key.partition(".")
        if of != section:
            lines += ["", f"[{of}]"] if lines else [f"[{of}]"]
            section = of
        value = configuration.value_of(found, setting.key)
        lines.append(f"# {setting.meaning} ({setting.range})")
        lines.append(f"# {name} =" if value is None else f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    # JSON strings and numbers are TOML strings and numbers.
    return msgspec.json.encode(value).decode()
