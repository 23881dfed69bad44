"""`slotkeeper verify`: proves from the journals of a data directory that every promise was kept.

For each shard, in this order:
1. the chain: every row is there, unaltered, linked to the one before, up to the watermark (`journal.verify`);
2. the events: an auditor that shares nothing with the ledger but the events finds each counter within its limit at each
   position, each step of each reservation legal, and lists the times a plan went below what was booked (`engine.audit`);
3. the state: the ledger, replayed from the first event, comes to the same totals as the auditor;
4. the snapshots: each loads, and its totals are those of the replay at its position.
Then the planner: its chain, its events, and that no shard is ahead of it. Then the shards together: every reservation over
several of them is the same everywhere, or on its way (`engine.cross_audit`).

It reads only, so it may run beside a live engine; then it proves what was durable when it looked. Everything it finds is named;
nothing is skipped and nothing is changed.

Not promised: that the disk will give the same bytes tomorrow.
"""

from collections.abc import Callable
from pathlib import Path

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
    planner, planned_seq = _verify_planner(journals[-1], told)
    found = [_verify_shard(journal, planned_seq, told, metadata.shards) for journal in journals[:-1]]
    shards = [report for report, _ in found]
    cross = _verify_cross([auditor for _, auditor in found])
    is_proven = not any(report.problems for report in (planner, cross, *shards))
    return Report(is_proven, shards, planner, cross)


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
        self.problems: list[str] = []
        try:
            chain = verify_chain(directory)
        except JournalError as error:
            self.problems.append(str(error))
            return
        self.segments, self.rows, self.events = chain.segments, chain.rows, chain.events
        self.problems = [str(problem) for problem in chain.problems]

    def report(self, head: int, counters: int, reservations: int) -> JournalReport:
        return JournalReport(
            self.directory.name,
            self.segments,
            self.rows,
            self.events,
            head,
            counters,
            reservations,
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


def _snapshots(directory: Path, findings: _Findings) -> dict[int, tuple[str, bytes, list[CounterTotals], int]]:
    """Name, hash, totals and number of records of each snapshot, by its position."""
    found = {}
    for path in newest_first(directory):
        try:
            state, position = load(path)
        except (SnapshotError, OSError) as error:
            findings.problems.append(f"{error}. The journal is whole without it: remove the file")
        else:
            found[position.seq] = (path.name, position.hash, _totals(state.counters), state.reservations.count)
    return found


def _verify_shard(
    directory: Path, planned_seq: int, progress: _Progress, shards: int
) -> tuple[JournalReport, Auditor]:
    findings = _Findings(directory)
    state, auditor = ledger.Ledger(), Auditor(shards)
    if findings.segments == 0:
        return findings.report(0, 0, 0), auditor
    snapshots = _snapshots(directory, findings)
    try:
        with JournalReader(directory) as reader:
            for row in reader.follow(GENESIS):
                for event in codec.decode_shard(row):
                    auditor.take(state.seq + 1, row.at_ms, event)
                    ledger.apply(state, event, row.at_ms)
                snapshot = snapshots.get(row.end.seq)
                if snapshot is not None:
                    name, hash_, totals, records = snapshot
                    if (hash_, totals, records) != (row.hash, _totals(state.counters), state.reservations.count):
                        findings.problems.append(
                            f"{name} is not the state at {row.end.seq}: remove it, and report how it came about"
                        )
                progress.add(len(row.body))
    except JournalError as error:
        if not findings.problems:
            findings.problems.append(str(error))
        findings.problems.append(f"events after {state.seq} could not be audited")
    except InvariantError as error:
        findings.problems.append(f"event {state.seq} cannot follow those before it: {error}")
    auditor.recount()
    findings.problems += [
        f"event {finding.seq}: {finding.what.value}: {finding.detail}"
        + (f" ({finding.counter[0]} {finding.counter[1]})" if finding.counter else "")
        for finding in auditor.findings
    ]
    if auditor.totals() != _totals(state.counters):
        findings.problems.append("the ledger and the auditor come to different totals")
    if state.planning_seq > planned_seq:
        findings.problems.append(
            f"the shard has planning events up to {state.planning_seq}, the planner only up to {planned_seq}: "
            "the planner's journal has lost its end; restore it"
        )
    findings.exceptions += [
        f"{over.counter[0]} {over.counter[1]}: {over.used} used over a limit of {over.limit} from event {over.seq} "
        + (f"to {over.until_seq}" if over.until_seq else "until now")
        for over in auditor.overcommitments
    ]
    return findings.report(state.seq, len(state.counters), state.reservations.count), auditor


def _verify_planner(directory: Path, progress: _Progress) -> tuple[JournalReport, int]:
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
            if not findings.problems:
                findings.problems.append(str(error))
            findings.problems.append(f"events after {state.seq} could not be audited")
        except InvariantError as error:
            findings.problems.append(f"event {state.seq} cannot follow those before it: {error}")
    counters = sum(len(slots) for slots in state.versions.values())
    return findings.report(state.seq, counters, 0), state.seq
