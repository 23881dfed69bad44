"""Options that several commands share, so that each has one spelling and one meaning."""

from typing import Final

import click

URL_DEFAULT: Final = "http://127.0.0.1:7411"
"""Where `slotkeeper serve` listens unless told otherwise; a test compares it with the configuration's default."""

url = click.option(
    "--url",
    default=URL_DEFAULT,
    show_default=True,
    envvar="SLOTKEEPER_URL",
    show_envvar=True,
    metavar="URL",
    help="The running service.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
