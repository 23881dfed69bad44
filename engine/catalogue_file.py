"""The file in the runtime directory that shows the pools to the api processes.

The planner replaces it as a whole; readers keep what they read and look again when the file's identity changes. It says
nothing that the planner's journal does not say, and is written anew at every start.
"""

import os
from pathlib import Path

import msgspec

CATALOGUE_FILE = "catalogue.json"


class PoolShown(msgspec.Struct, frozen=True):
    """A pool."""

    code: int
    pool_id: str
    capacity_type: str
    unit: str
    zone: str
    time_zone: str
    cutoff: tuple[int | None, int | None, int | None] | None
    version: int


class CatalogueShown(msgspec.Struct, frozen=True):
    """All pools, with everything up to `planning_seq`."""

    planning_seq: int
    pools: list[PoolShown]


def write(runtime: Path, shown: CatalogueShown) -> None:
    """Replace the file. Readers see the old one or the new one."""
    path = runtime / CATALOGUE_FILE
    temporary = path.with_suffix(".new")
    temporary.write_bytes(msgspec.json.encode(shown))
    temporary.replace(path)


class CatalogueReader:
    """The pools, as the file has them."""

    def __init__(self, runtime: Path) -> None:
        self._path = runtime / CATALOGUE_FILE
        self._identity: tuple[int, int, int] | None = None
        self.planning_seq = 0
        self.pools: dict[str, PoolShown] = {}
        self.pool_of_code: dict[int, PoolShown] = {}

    def refresh(self) -> None:
        """Read the file again if it is another one now: one system call when it is not."""
        try:
            found = os.stat(self._path)  # noqa: PTH116 - a system call is all this may cost
        except FileNotFoundError:
            return
        identity = (found.st_ino, found.st_mtime_ns, found.st_size)
        if identity == self._identity:
            return
        shown = msgspec.json.decode(self._path.read_bytes(), type=CatalogueShown)
        self._identity = identity
        self.planning_seq = shown.planning_seq
        self.pools = {pool.pool_id: pool for pool in shown.pools}
        self.pool_of_code = {pool.code: pool for pool in shown.pools}
