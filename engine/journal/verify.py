"""Proving the chain of a journal: every row of every segment, and that the end is there.

Rules:
- Reads only, like tail.py; a live writer is not in the way.
- Goes on after a problem wherever the next row or segment can still be judged, so that an operator sees all damage at once.
  One altered row is one problem: the row after it is held against the hash which the altered row claims.
- No problem means: each row matches its hash and follows the row before it, from event 1 to the watermark at least, and
  each body is a JSON array of as many named events as the row says.

Not promised: that the events make sense together. That is proven by applying them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from engine.journal.segments import (
    CHAIN_START,
    HINT_RESTORE,
    WATERMARK_NAME,
    ChainState,
    DamageError,
    Problem,
    content_fault,
    first_seq_of,
    link_fault,
    list_segments,
    row_from_columns,
    segment_name,
    state_after,
    wal_of,
)
from engine.journal.tail import CHUNK_ROWS_MAX, SegmentView
from engine.journal.watermark import read_watermark
from engine.ports import GENESIS, JournalError, JournalRow, Position

PROBLEMS_MAX: Final = 1000
"""More than a person reads. The report says when it stopped listing."""

HINT_SLOT: Final = (
    "The other slot still proves the end of the journal. A loss of power in the middle of a write leaves this, and the next "
    "start of the worker mends it; seen at any other time it is a sign of a failing disk"
)
HINT_UNSEALED: Final = (
    "A writer seals a segment before it makes the next one. Find out which program wrote here besides the worker"
)


@dataclass(frozen=True, slots=True)
class ChainReport:
    """What `verify_chain` found."""

    segments: int
    """Segment files in the directory."""
    rows: int
    """Rows that could be read, damaged ones among them when they could be told apart."""
    events: int
    """Events which these rows say they hold."""
    head: Position
    """The end of the last row that could be read."""
    problems: tuple[Problem, ...]
    """Empty when all is proven."""


class _Walk:
    """One walk over a journal."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problems: list[Problem] = []
        self.rows = 0
        self.events = 0
        self.chain = CHAIN_START
        self.promised = GENESIS
        self.resume_on_any_hash = False
        """After a hole the next segment is not held against the row before the hole."""

    def add(self, file: Path, seq: int, what: str, hint: str = HINT_RESTORE) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(Problem(str(file), seq, what, hint))
        elif len(self.problems) == PROBLEMS_MAX:
            self.problems.append(
                Problem(str(file), seq, f"more than {PROBLEMS_MAX} problems, the rest is not listed", hint)
            )

    def read_promise(self, segments: list[Path]) -> None:
        path = self.directory / WATERMARK_NAME
        try:
            watermark = read_watermark(self.directory)
        except DamageError as error:
            self.problems.append(error.problem)
            return
        if watermark is None:
            if segments:
                self.add(path, 0, "the watermark is missing, so nothing proves that the end of the journal is there")
            return
        self.promised = watermark.position
        if watermark.slots_damaged:
            self.add(path, watermark.position.seq, "one slot of the watermark is damaged", HINT_SLOT)

    def walk_segment(self, path: Path, *, is_last: bool) -> None:
        first_seq = first_seq_of(path)
        expected_seq = self.chain.end.seq + 1
        continues = first_seq == expected_seq and not self.resume_on_any_hash
        self.resume_on_any_hash = False
        if first_seq > expected_seq:
            self.add(
                self.directory / segment_name(expected_seq),
                expected_seq,
                f"events {expected_seq} to {first_seq - 1} are missing: no segment holds them",
            )
        elif first_seq < expected_seq:
            self.add(
                path,
                first_seq,
                f"the segment begins at event {first_seq}, which an earlier segment already holds: two histories were mixed "
                "in one directory",
            )
        view = SegmentView(path)
        try:
            self._walk_meta(view, continues=continues, is_last=is_last)
            for row in self._rows_of(view, first_seq):
                self._judge(path, row)
        except FileNotFoundError:
            self.add(path, first_seq, "the segment went away while it was read")
        except DamageError as error:
            self.problems.append(error.problem)
            self.resume_on_any_hash = True
        finally:
            view.close()

    def _walk_meta(self, view: SegmentView, *, continues: bool, is_last: bool) -> None:
        first_seq = first_seq_of(view.path)
        try:
            meta = view.meta()
        except DamageError as error:
            # The rows may be sound all the same, and are judged by their own chain.
            self.problems.append(error.problem)
            if not continues:
                self.chain = ChainState(Position(first_seq - 1, bytes(16)), 0, 0, 0)
                self.resume_on_any_hash = True
            return
        if continues and meta.prev_hash != self.chain.end.hash:
            self.add(
                view.path, first_seq, "the segment does not continue the segment before it: it is of another history"
            )
        if not continues or meta.prev_hash != self.chain.end.hash:
            # Times and epochs across a hole are still held against each other, hashes cannot be.
            self.chain = self.chain._replace(end=Position(first_seq - 1, meta.prev_hash))
        if not is_last and not meta.sealed:
            self.add(view.path, first_seq, "a later segment exists but this one was not sealed", HINT_UNSEALED)
        wal = wal_of(view.path)
        if not view.path.stat().st_mode & 0o222 and wal.exists() and wal.stat().st_size:
            self.add(wal, first_seq, "a sealed segment has a write-ahead log, which nobody reads", HINT_UNSEALED)

    def _rows_of(self, view: SegmentView, first_seq: int) -> Iterator[JournalRow]:
        """The rows that can be told apart; unreadable ones become problems."""
        seq = first_seq - 1
        while chunk := view.rows_after(seq, CHUNK_ROWS_MAX):
            for columns in chunk:
                row = row_from_columns(columns)
                if row is None:
                    self.add(view.path, self.chain.end.seq + 1, "the row is damaged")
                    self.resume_on_any_hash = True
                else:
                    yield row
            last_seq = chunk[-1][0]
            if type(last_seq) is not int or last_seq <= seq:
                raise view.damage(seq + 1, "the rows after this are out of order")
            seq = last_seq

    def _judge(self, path: Path, row: JournalRow) -> None:
        self.rows += 1
        self.events += row.count
        before = self.chain
        if self.resume_on_any_hash:
            before = before._replace(end=Position(before.end.seq, row.prev_hash))
            self.resume_on_any_hash = False
        fault = link_fault(before, row)
        if fault is not None:
            self.add(path, before.end.seq + 1, fault)
        fault = content_fault(row) or _body_fault(row)
        if fault is not None:
            self.add(path, row.seq, fault)
        self.chain = state_after(row)
        if row.end.seq == self.promised.seq and row.end.hash != self.promised.hash:
            self.add(path, row.seq, "the watermark knows another row here: this is another history")

    def check_reach(self, segments: list[Path]) -> None:
        if self.chain.end.seq < self.promised.seq:
            first = self.chain.end.seq + 1
            self.add(
                segments[-1] if segments else self.directory / segment_name(1),
                first,
                f"events {first} to {self.promised.seq} are missing: the watermark says that they were durable",
            )


def _body_fault(row: JournalRow) -> str | None:
    try:
        events = orjson.loads(row.body)
    except orjson.JSONDecodeError as error:
        return f"the body is not JSON: {error}"
    if not isinstance(events, list) or len(events) != row.count:
        return f"the body is not an array of {row.count} events"
    if not all(isinstance(event, list) and event and isinstance(event[0], str) for event in events):
        return "the body has an event that is not an array beginning with its name"
    return None


def verify_chain(directory: Path) -> ChainReport:
    """Walk over everything in a journal's directory and list what is wrong. Changes nothing.

    Raises `JournalError` for what is no damage but keeps it from reading: no such directory, a file that stays locked.
    """
    if not directory.is_dir():
        raise JournalError(f"{directory}: there is no such directory. Name the directory of one journal, like shard-00")
    walk = _Walk(directory)
    segments = list_segments(directory)
    walk.read_promise(segments)  # before the rows: what it promises must then be there
    for path in segments:
        walk.walk_segment(path, is_last=path == segments[-1])
    walk.check_reach(segments)
    return ChainReport(len(segments), walk.rows, walk.events, walk.chain.end, tuple(walk.problems))
