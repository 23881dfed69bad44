"""Proof over all shards of a data directory: what a home says of its parts is what the other shards have.

It joins what each shard's auditor came to (`engine.audit`), so like that it shares nothing with the ledger.

What it proves, for journals read one after another, in order of shard
- every part of a live reservation whose news is settled exists on its shard, in the same version, status and lines;
- no part takes units for a reservation that does not name it;
- no shard knows more than its home has decided.

Legal, and counted instead as in flight
- news that a home still owes; parts that are pinned, whose home has not said what became of them;
- what happened between the reading of two journals of a running engine. Which way that can differ follows from the order: of
  two shards the one read later may be ahead, never the one read earlier.
Legal as well: a hold that has expired by its part's clock and not yet by its home's; what was forgotten because it was
finished or for a slot long past, as far as the journals say that it was.

Not promised: that what is in flight arrives. An engine that is started settles it within seconds, else `doubt` would be broken.
"""

from typing import NamedTuple

from engine.audit import EXPIRED, FULFILLED, HELD, STATUS_WORDS, Auditor, Home, Part


class Report(NamedTuple):
    """What was found over all shards."""

    problems: list[str]
    """Each one is a proof that failed."""
    reservations: int
    """Reservations over several shards that are not forgotten."""
    parts: int
    """Parts of theirs that are not forgotten."""
    owed: int
    """In flight: reservations whose last change is not yet known everywhere."""
    pinned: int
    """In flight: parts whose home has not said what became of them."""
    moving: int
    """In flight: differences that came about between the reading of two journals."""


def cross_audit(auditors: list[Auditor]) -> Report:
    """Join the auditors of all shards, in the order in which their journals were read, which is that of the shards."""
    joined = _Join(auditors)
    for shard, auditor in enumerate(auditors):
        for home in auditor.homes():
            joined.home(shard, home)
        for part in auditor.parts():
            joined.part(shard, part)
    return Report(joined.problems, joined.reservations, joined.parts, joined.owed, joined.pinned, joined.moving)


class _Join:
    def __init__(self, auditors: list[Auditor]) -> None:
        self._auditors = auditors
        self.problems: list[str] = []
        self.reservations = self.parts = self.owed = self.pinned = self.moving = 0

    def home(self, shard: int, home: Home) -> None:
        """From a reservation to its parts."""
        self.reservations += 1
        if home.is_owed:
            self.owed += 1
        for other, (number, lines) in home.parts.items():
            where = f"reservation {home.number} of shard {shard}, part {number} on shard {other}"
            if not 0 <= other < len(self._auditors) or other == shard:
                self.problems.append(f"{where}: there is no such other shard")
                continue
            part = self._auditors[other].part(number)
            if part is None:
                self._missing(shard, home, other, number, bool(lines), where)
            else:
                self._compare(shard, home, other, part, where)

    def _missing(self, shard: int, home: Home, other: int, number: int, takes: bool, where: str) -> None:
        there = self._auditors[other]
        if not there.knew(number):
            if other < shard:
                self.moving += 1  # it was made after that journal was read
            else:
                self.problems.append(f"{where}: that shard has never made it, so its journal has lost its end")
        elif takes and home.status <= FULFILLED and not home.is_owed and not there.has_left(number):
            if home.status == HELD and home.expires_at_ms <= there.at_ms:
                return  # expired there and forgotten; its home has been down since
            self.problems.append(f"{where}: {STATUS_WORDS[home.status]} at home, unknown there")

    def _compare(self, shard: int, home: Home, other: int, part: Part, where: str) -> None:
        if part.home_shard != shard or part.reservation not in (0, home.number):
            self.problems.append(f"{where}: it is a part of {part.reservation} of shard {part.home_shard}")
        elif part.version > home.version:
            if shard < other:
                self.moving += 1
            else:
                self.problems.append(f"{where}: version {part.version} there, only {home.version} at home")
        elif home.is_owed or part.is_pinned:
            pass  # counted as such
        elif part.version < home.version:
            if other < shard:
                self.moving += 1
            else:
                self.problems.append(f"{where}: settled at {home.version}, but it is at {part.version}")
        elif not self._agree(home, part, home.parts[other][1]):
            self.problems.append(
                f"{where}: {STATUS_WORDS[home.status]} {home.parts[other][1]} at home, "
                f"{STATUS_WORDS[part.status]} {part.lines} there, both in version {part.version}"
            )

    @staticmethod
    def _agree(home: Home, part: Part, lines: dict[tuple[str, str], int]) -> bool:
        if not lines:
            return part.status > FULFILLED
        if part.lines != lines:
            return False
        return part.status == home.status or (home.status == HELD and part.status == EXPIRED)

    def part(self, shard: int, part: Part) -> None:
        """From a part to its reservation."""
        self.parts += 1
        if part.is_pinned:
            self.pinned += 1
            return
        if part.status > FULFILLED or not part.lines:
            return
        where = f"part {part.number} on shard {shard}"
        if not 0 <= part.home_shard < len(self._auditors) or part.home_shard == shard:
            self.problems.append(f"{where}: its home is shard {part.home_shard}, which cannot be")
            return
        there = self._auditors[part.home_shard]
        home = there.home(part.reservation)
        where += f", of reservation {part.reservation} of shard {part.home_shard}"
        if home is None:
            if not there.knew(part.reservation):
                if part.home_shard < shard:
                    self.moving += 1
                else:
                    self.problems.append(f"{where}: its home has never made that, so its journal has lost its end")
            elif not there.has_left(part.reservation):
                if shard < part.home_shard:
                    self.moving += 1
                else:
                    self.problems.append(f"{where}: it takes units for a reservation that its home does not know")
        elif home.parts.get(shard, (0,))[0] != part.number:
            if (shard < part.home_shard and part.version < home.version) or (
                part.home_shard < shard and part.version > home.version
            ):
                self.moving += 1
            else:
                self.problems.append(f"{where}: it takes units, but its reservation does not name it")
