"""`slotkeeper verify`: proves from the journals of a data directory that every promise was kept.

For each shard, in this order:
1. the chain: every row is there, unaltered, linked to the one before, up to the watermark (`journal.verify`);
2. the events: an auditor that shares nothing with the ledger but the events finds each counter within its limit at each
   position, each step of each reservation legal, and lists the times a plan went below what was booked (`engine.audit`);
3. the state: the ledger, replayed from the first event, comes to the same totals as the auditor;
4. the snapshots: each loads, and its totals and its part in reservations over several shards are those of the replay at its
   position.
Then the planner: its chain, its events, and that no shard is ahead of it. It comes last because a live one goes on: what
the shards had when they were read, its journal had before. Last the shards together: every reservation over several of them
is the same everywhere, or on its way (`engine.cross_audit`).

It reads only, so it may run beside a live engine; then it proves what was durable when it looked. Everything it finds is named;
nothing is skipped and nothing is changed.

Not promised: that the disk will give the same bytes tomorrow.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine import codec, datadir
from engine.audit import Auditor, CounterTotals
from engine.core import catalogue, ledger
from engine.core.columns import CounterTable
from engine.core.invariant import InvariantError
from engine.cross_audit import cross_audit
from engine.journal.segments import list_segments, wal_of
from engine.journal.tail import JournalReader
from engine.journal.verify import verify_chain
from engine.ports import GENESIS, JournalError
from engine.snapshot import SnapshotError, load, newest_first

Progress = Callable[[int, int], None]
"""Told the bytes of journal bodies gone through so far and, roughly, in all."""

LISTED_MAX = 1_000
"""Problems and exceptions listed for each journal; more are counted in the last line."""


class JournalReport(msgspec.Struct, frozen=True):
    """What was found in one journal. `problems` is empty when all is proven."""

    name: str
    segments: int
    rows: int
    events: int
    head: int
    """The last event."""
    counters: int
    reservations: int
    """Records not yet forgotten."""
    problems: list[str]
    """Each one is a proof that failed, with the file or position and what to do."""
    exceptions: list[str]
    """Recorded and legal: the times a counter was overcommitted by a plan."""


class CrossReport(msgspec.Struct, frozen=True):
    """What was found between the shards."""

    reservations: int
    """Reservations over several shards that are not forgotten."""
    parts: int
    """Their parts on other shards."""
    owed: int
    """In flight: reservations whose last change is not yet known everywhere."""
    pinned: int
    """In flight: parts whose home has not said what became of them."""
    moving: int
    """In flight: differences that came about between the reading of two journals of a running engine."""
    problems: list[str]


class Report(msgspec.Struct, frozen=True):
    """What was found in a data directory."""

    ok: bool
    """Everything is proven."""
    shards: list[JournalReport]
    planner: JournalReport
    cross: CrossReport


class _Progress:
    def __init__(self, tell: Progress | None, bytes_total: int) -> None:
        self._tell = tell
        self._total = bytes_total
        self._done = 0

    def add(self, size: int) -> None:
        self._done += size
        if self._tell is not None:
            self._tell(min(self._done, self._total), self._total)


def verify_data_directory(directory: Path, progress: Progress | None = None) -> Report:
    """Prove a data directory. Raises DataDirectoryError where it is none."""
    metadata = datadir.load(directory)
    journals = [datadir.shard_directory(directory, shard) for shard in range(metadata.shards)]
    journals.append(datadir.planning_directory(directory))
    sizes = sum(_size(path) for journal in journals if journal.is_dir() for path in _files(journal))
    told = _Progress(progress, max(1, sizes))
    found = [_verify_shard(journal, told, metadata.shards) for journal in journals[:-1]]
    planner = _verify_planner(journals[-1], told)
    for findings, planning_seq, _ in found:
        if planning_seq > planner.head and not planner.problems:  # else its end was not read, and that is told already
            findings.problems.append(
                f"the shard has planning events up to {planning_seq}, the planner only up to {planner.head}: "
                "the planner's journal has lost its end; restore it"
            )
    cross = _verify_cross([auditor for _, _, auditor in found])
    shards = [findings.report() for findings, _, _ in found]
    problems = [*cross.problems, *planner.problems, *(problem for report in shards for problem in report.problems)]
    return Report(not problems, shards, planner, cross)


def _verify_cross(auditors: list[Auditor]) -> CrossReport:
    found = cross_audit(auditors)
    return CrossReport(
        found.reservations, found.parts, found.owed, found.pinned, found.moving, _bounded(found.problems)
    )


def _files(journal: Path) -> list[Path]:
    segments = list_segments(journal)
    return segments + [wal_of(path) for path in segments]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class _Findings:
    """The chain of one journal, and what else is found in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.exceptions: list[str] = []
        self.segments = self.rows = self.events = 0
        self.head = self.counters = self.reservations = 0
        self.problems: list[str] = []
        try:
            chain = verify_chain(directory)
        except JournalError as error:
            self.problems.append(str(error))
            return
        self.segments, self.rows, self.events = chain.segments, chain.rows, chain.events
        self.problems = [str(problem) for problem in chain.problems]

    def unaudited(self, seq: int, error: JournalError) -> None:
        """The events end at `seq` because the journal cannot be read on."""
        if not self.problems:
            self.problems.append(str(error))
        self.problems.append(f"events after {seq} could not be audited")

    def report(self) -> JournalReport:
        return JournalReport(
            self.directory.name,
            self.segments,
            self.rows,
            self.events,
            self.head,
            self.counters,
            self.reservations,
            _bounded(self.problems),
            _bounded(self.exceptions),
        )


def _bounded(lines: list[str]) -> list[str]:
    if len(lines) <= LISTED_MAX:
        return lines
    return [*lines[:LISTED_MAX], f"and {len(lines) - LISTED_MAX} more"]


def _totals(counters: CounterTable) -> list[CounterTotals]:
    return [
        CounterTotals(
            counters.pool_id[row],
            counters.slot_id[row],
            counters.base[row],
            counters.limit[row],
            counters.held[row],
            counters.confirmed[row],
            counters.fulfilled[row],
            counters.refused[row],
        )
        for row in range(len(counters))
    ]


class _Shared(NamedTuple):
    """What a shard knows of reservations over several shards."""

    parts: dict[int, tuple[ledger.Part, ...]]
    links: dict[int, ledger.Link]
    owed: list[int]


def _shared(state: ledger.Ledger) -> _Shared:
    return _Shared(dict(state.parts), dict(state.links), list(state.owed))


class _Snapshot(NamedTuple):
    """What is compared with the replay."""

    name: str
    hash: bytes
    totals: list[CounterTotals]
    reservations: int
    shared: _Shared


def _snapshots(directory: Path, findings: _Findings) -> dict[int, _Snapshot]:
    """Every snapshot that loads, by its position."""
    found = {}
    for path in newest_first(directory):
        try:
            state, position = load(path)
        except FileNotFoundError:
            continue  # a live worker has a newer one and removed it
        except (SnapshotError, OSError) as error:
            findings.problems.append(f"{error}. The journal is whole without it: remove the file")
        else:
            found[position.seq] = _Snapshot(
                path.name, position.hash, _totals(state.counters), state.reservations.count, _shared(state)
            )
    return found


def _verify_shard(directory: Path, progress: _Progress, shards: int) -> tuple[_Findings, int, Auditor]:
    """What was found, up to which planning event the shard has everything, and what its auditor came to."""
    findings = _Findings(directory)
    state, auditor = ledger.Ledger(), Auditor(shards)
    if findings.segments == 0:
        return findings, 0, auditor
    snapshots = _snapshots(directory, findings)
    try:
        with JournalReader(directory) as reader:
            for row in reader.follow(GENESIS):
                for event in codec.decode_shard(row):
                    auditor.take(state.seq + 1, row.at_ms, event)
                    ledger.apply(state, event, row.at_ms)
                snapshot = snapshots.pop(row.end.seq, None)
                if snapshot is not None:
                    now = _Snapshot(
                        snapshot.name, row.hash, _totals(state.counters), state.reservations.count, _shared(state)
                    )
                    if snapshot != now:
                        findings.problems.append(
                            f"{snapshot.name} is not the state at {row.end.seq}: remove it, and report how it came about"
                        )
                progress.add(len(row.body))
        findings.problems += [
            f"{snapshot.name} is of position {seq}, where no row of the journal ends: remove it, and report how it came about"
            for seq, snapshot in snapshots.items()
        ]
    except JournalError as error:
        findings.unaudited(state.seq, error)
    except (InvariantError, Exception) as error:  # noqa: BLE001 - whatever an event leads to is a finding about it
        findings.problems.append(_cannot_follow(state.seq, error))
    auditor.recount()
    findings.problems += [
        f"event {finding.seq}: {finding.what.value}: {finding.detail}"
        + (f" ({finding.counter[0]} {finding.counter[1]})" if finding.counter else "")
        for finding in auditor.findings
    ]
    if auditor.totals() != _totals(state.counters):
        findings.problems.append("the ledger and the auditor come to different totals")
    findings.exceptions += [
        f"{over.counter[0]} {over.counter[1]}: {over.used} used over a limit of {over.limit} from event {over.seq} "
        + (f"to {over.until_seq}" if over.until_seq else "until now")
        for over in auditor.overcommitments
    ]
    findings.head, findings.counters = state.seq, len(state.counters)
    findings.reservations = state.reservations.count
    return findings, state.planning_seq, auditor


def _cannot_follow(seq: int, error: BaseException) -> str:
    return f"event {seq} cannot follow those before it: {error if isinstance(error, InvariantError) else repr(error)}"


def _verify_planner(directory: Path, progress: _Progress) -> JournalReport:
    findings = _Findings(directory)
    state = catalogue.Catalogue()
    if findings.segments:
        try:
            with JournalReader(directory) as reader:
                for row in reader.follow(GENESIS):
                    for event in codec.decode_planner(row):
                        catalogue.apply(state, event, row.at_ms)
                    progress.add(len(row.body))
        except JournalError as error:
            findings.unaudited(state.seq, error)
        except (InvariantError, Exception) as error:  # noqa: BLE001 - whatever an event leads to is a finding about it
            findings.problems.append(_cannot_follow(state.seq, error))
    findings.head = state.seq
    findings.counters = sum(len(slots) for slots in state.versions.values())
    return findings.report()
