"""An auditor that proves from a shard's events alone that every promise was kept at every position.

It is a second, naive reading of the events. It does not import the ledger or its columns, so a mistake there does not
repeat itself here; it shares with them the events and the rule that makes a reservation's number, both part of the journal's
format. `slotkeeper verify` folds a journal through it and compares `totals` with what the ledger came to.

What it proves
- taking units never makes `used` pass `limit`, and nothing is taken of a counter that is closed or past its cut-off;
- `used` above `limit` comes from a plan that lowered the limit, and each such time is listed, with its end;
- every step of a reservation is legal by STEPS below, and no key makes two live records;
- holds expire at their own time and not before it. A million that are due at once are freed in many events, with decisions
  in between; what each of those keeps to: no step is taken on a hold that is due and has not been expired, and nobody is
  refused for `insufficient_capacity` on a counter where such holds still take units;
- a refusal had a cause;
- terms, plans, positions rise and time does not go back;
- parts of reservations whose home is another shard take units as everything does: they are prepared within the limits, never
  for an attempt that is over, give nothing up while they are pinned, do not expire then, and what their home says of them
  never goes back and never takes what was not prepared;
- at home, each step names every part there was, and what is settled is the last version.
  That the shards agree about a part is proven over all of them by `engine.cross_audit`;
- `recount`: units of a counter are the sum of the lines of its reservations, by status. This one reads every live
  reservation, so it is asked for at a position and not repeated at each.

A broken rule is a finding, a value. After it the auditor goes on with what the event says where that has a meaning, and
passes over the event where it has none, so one mistake may be followed by findings that are its consequences: read the first.

Not promised: that the bytes are what was written (the journal's hash chain does that), that an answer reached anybody, or
that a retried refusal was counted once (the keys of refusals are not kept for ever).
"""

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from engine.core import events
from engine.core.sharding import HASH_BITS, counter_hash, reservation_number

HELD, CONFIRMED, FULFILLED, RELEASED, EXPIRED = range(5)
"""Status of a record. The first three take units and index `_Counter.units`. In the journal they are numbered from 1."""

STATUS_WORDS = ("held", "confirmed", "fulfilled", "released", "expired")

STEPS: dict[tuple[int, str], int] = {
    (HELD, "confirm"): CONFIRMED,
    (HELD, "extend"): HELD,
    (HELD, "move"): HELD,
    (HELD, "release"): RELEASED,
    (HELD, "expire"): EXPIRED,
    (EXPIRED, "confirm late"): CONFIRMED,
    (CONFIRMED, "move"): CONFIRMED,
    (CONFIRMED, "release"): RELEASED,
    (CONFIRMED, "fulfil"): FULFILLED,
}
"""Every legal step, written down from the vocabulary and not from the ledger. What is not here is illegal."""

FINDINGS_MAX = 1_000
"""Findings kept; more are only counted. A journal with a thousand of them needs a person, not a longer list."""

_DAY_MS = 86_400_000
_DAYS_MAX = 2_900_000
"""So many days after 1970 the year still has four digits."""
_NUMBER_BITS = 64
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
Lines = tuple[events.CounterUnits, ...]
CounterName = tuple[str, str]
"""pool_id and slot_id."""


class Rule(StrEnum):
    """What a finding is about: named after the rule as it was broken."""

    SEQ_SKIPPED = "seq_skipped"
    TIME_WENT_BACK = "time_went_back"
    TERM_NOT_RISEN = "term_not_risen"
    PLANNING_SEQ_NOT_RISEN = "planning_seq_not_risen"
    UNKNOWN_POOL = "unknown_pool"
    UNKNOWN_RESERVATION = "unknown_reservation"
    EVENT_MALFORMED = "event_malformed"
    LIMIT_PASSED = "limit_passed"
    TAKEN_WHILE_CLOSED = "taken_while_closed"
    TAKEN_PAST_CUTOFF = "taken_past_cutoff"
    UNITS_BELOW_ZERO = "units_below_zero"
    UNITS_NOT_THE_SUM = "units_not_the_sum"
    STEP_ILLEGAL = "step_illegal"
    KEY_USED_TWICE = "key_used_twice"
    KEPT_MORE_THAN_HELD = "kept_more_than_held"
    HOLD_SHORTENED = "hold_shortened"
    EXPIRED_TOO_EARLY = "expired_too_early"
    EXPIRED_AT_ANOTHER_TIME = "expired_at_another_time"
    HOLD_OVERDUE = "hold_overdue"
    REFUSED_WITHOUT_CAUSE = "refused_without_cause"
    PREPARED_TOO_LATE = "prepared_too_late"
    PART_GAVE_UP_UNITS = "part_gave_up_units"
    PART_TOOK_UNPREPARED = "part_took_unprepared"
    PART_WENT_BACK = "part_went_back"
    PART_OF_ANOTHER = "part_of_another"
    EXPIRED_WHILE_PINNED = "expired_while_pinned"
    PART_LEFT_OUT = "part_left_out"
    SETTLED_ANOTHER_VERSION = "settled_another_version"


class Finding(NamedTuple):
    """A rule broken by event `seq`: on which counter or reservation, and in words for a person."""

    seq: int
    what: Rule
    counter: CounterName | None
    number: int | None
    detail: str


class Overcommitment(NamedTuple):
    """Not a finding: a plan set `limit` below the `used` units at `seq`. It was over at `until_seq`, None: not yet."""

    seq: int
    counter: CounterName
    used: int
    limit: int
    until_seq: int | None


class CounterTotals(NamedTuple):
    """A counter as its events leave it, in units."""

    pool_id: str
    slot_id: str
    base: int
    limit: int
    held: int
    confirmed: int
    fulfilled: int
    refused: int


class Statistics(NamedTuple):
    """How much has been audited."""

    seq: int
    """The last event taken."""
    counters: int
    """Counters defined."""
    reservations: int
    """Records not forgotten."""
    findings: int
    """Rules broken, those beyond FINDINGS_MAX included."""
    overcommitments: int
    """Times a plan went below what was booked."""
    refused_beside_attempts: int = 0
    """Refusals whose units were free in the journal: attempts over several shards, which leave no trace, wanted them."""


class Part(NamedTuple):
    """A part of a reservation whose home is another shard, as this shard's events leave it."""

    number: int
    home_shard: int
    reservation: int
    """Its number at home; 0 while its home has not said that it exists."""
    version: int
    """The reservation's version that it has taken over."""
    is_pinned: bool
    status: int
    lines: dict[CounterName, int]


class Home(NamedTuple):
    """A reservation at home here with parts on other shards."""

    number: int
    status: int
    version: int
    expires_at_ms: int
    is_owed: bool
    """Not all other shards have taken over its last version."""
    parts: dict[int, tuple[int, dict[CounterName, int]]]
    """Number and lines by shard. No lines: to be given up."""


class _Counter:
    """A counter: what was planned, what is taken."""

    __slots__ = (
        "base",
        "closed",
        "cutoff_at_ms",
        "ends_at_ms",
        "hashed",
        "left",
        "limit",
        "name",
        "overcommitment",
        "overdue",
        "refused",
        "units",
    )

    def __init__(self, name: CounterName, ends_at_ms: int) -> None:
        self.name = name
        self.hashed = counter_hash(*name)
        self.ends_at_ms = ends_at_ms
        """As first defined: a counter keeps its instants."""
        self.base = 0
        self.limit = 0
        self.closed = False
        self.cutoff_at_ms = 0
        self.units = [0, 0, 0]
        """Units by HELD, CONFIRMED, FULFILLED."""
        self.left = [0, 0, 0]
        """The part of `units` whose records have been forgotten."""
        self.refused = 0
        self.overdue = 0
        """Units of the holds in `Auditor._overdue`."""
        self.overcommitment: int | None = None
        """Index in `Auditor.overcommitments` of the one that is not over."""


class _Record(msgspec.Struct, gc=False):
    """A reservation. A struct outside the garbage collector's sight: there are millions."""

    status: int
    lines: Lines
    expires_at_ms: int
    changed_at_ms: int
    key: bytes
    version: int = 1


class _Link(msgspec.Struct, gc=False):
    """What makes a record a part."""

    home_shard: int
    tx: int
    reservation: int
    version: int
    is_pinned: bool


class Auditor:
    """Folds the events of one shard, from the first on, and remembers every rule one of them broke."""

    def __init__(self, shards: int = 1) -> None:
        self._shards = shards
        self._links: dict[int, _Link] = {}
        self._elsewhere: dict[int, dict[int, tuple[int, dict[CounterName, int]]]] = {}
        self._owed: set[int] = set()
        self._left: set[int] = set()
        """Parts and reservations with parts that have been forgotten while they took units: for slots long past."""
        self._refused_beside_attempts = 0
        self.findings: list[Finding] = []
        self.overcommitments: list[Overcommitment] = []
        self._findings_count = 0
        self._seq = 0
        self._at_ms = 0
        self._term = (0, 0)
        self._planning_seq = 0
        self._pool_of_code: dict[int, str] = {}
        self._row_of_counter: dict[CounterName, int] = {}
        self._counters: list[_Counter] = []
        self._records: dict[int, _Record] = {}
        self._numbers = array("q")
        """The keys of `_records`, rising, and some that are gone: to find a range of them."""
        self._keys: set[bytes] = set()
        self._due: list[int] = []
        """A heap of `expires_at_ms << _NUMBER_BITS | number`; entries of what is no longer held are passed over."""
        self._overdue: set[int] = set()
        """Holds that have left the heap, found due and not expired when somebody was refused. `_Counter.overdue` has them."""
        self._fold: dict[type, Callable[[Any], None]] = {
            events.TermStarted: self._term_started,
            events.Held: self._held,
            events.ConfirmedAtOnce: self._confirmed_at_once,
            events.Confirmed: self._confirmed,
            events.Released: self._released,
            events.Extended: self._extended,
            events.Moved: self._moved,
            events.Fulfilled: self._fulfilled,
            events.Expired: self._expired,
            events.PartPrepared: self._part_prepared,
            events.PartSynced: self._part_synced,
            events.PartsSettled: self._parts_settled,
            events.Refused: self._refused,
            events.PoolDefined: self._pool_defined,
            events.CountersDefined: self._counters_defined,
            events.Forgotten: self._forgotten,
        }

    def take(self, seq: int, at_ms: int, event: events.ShardEvent) -> None:
        """The next event, with its position and the time of its row. What it breaks is in `findings` afterwards."""
        if seq != self._seq + 1:
            self._find(Rule.SEQ_SKIPPED, f"{seq} comes after {self._seq}", seq=seq)
        if at_ms < self._at_ms:
            self._find(Rule.TIME_WENT_BACK, f"{at_ms} ms comes after {self._at_ms} ms", seq=seq)
        self._seq = seq
        self._at_ms = at_ms
        self._fold[type(event)](event)
        if self._due and self._due[0] >> _NUMBER_BITS <= at_ms:
            self._pass_over_what_is_done()

    def recount(self) -> None:
        """Compare the units of every counter with the sum of its reservations' lines. Takes about 0.3 s a million."""
        sums = [counter.left[:] for counter in self._counters]
        for record in self._records.values():
            if record.status <= FULFILLED:
                for row, units in record.lines:
                    sums[row][record.status] += units
        for counter, by_status in zip(self._counters, sums, strict=True):
            if by_status != counter.units:
                self._find(
                    Rule.UNITS_NOT_THE_SUM, f"units {counter.units}, sum of the lines {by_status}", counter=counter
                )

    def totals(self) -> list[CounterTotals]:
        """Every counter, in order of definition, which is the order of the ledger's rows."""
        return [
            CounterTotals(
                pool_id=counter.name[0],
                slot_id=counter.name[1],
                base=counter.base,
                limit=counter.limit,
                held=counter.units[HELD],
                confirmed=counter.units[CONFIRMED],
                fulfilled=counter.units[FULFILLED],
                refused=counter.refused,
            )
            for counter in self._counters
        ]

    def statistics(self) -> Statistics:
        """How much has been audited, and with what result."""
        return Statistics(
            self._seq,
            len(self._counters),
            len(self._records),
            self._findings_count,
            len(self.overcommitments),
            self._refused_beside_attempts,
        )

    @property
    def at_ms(self) -> int:
        """The time of the last event."""
        return self._at_ms

    def parts(self) -> Iterator[Part]:
        """Every part here that is not forgotten."""
        for number in self._links:
            part = self.part(number)
            if part is not None:
                yield part

    def part(self, number: int) -> Part | None:
        """One of `parts`."""
        link, record = self._links.get(number), self._records.get(number)
        if link is None or record is None:
            return None
        lines = {self._counters[row].name: units for row, units in record.lines}
        return Part(number, link.home_shard, link.reservation, link.version, link.is_pinned, record.status, lines)

    def homes(self) -> Iterator[Home]:
        """Every reservation at home here that has parts and is not forgotten."""
        for number in self._elsewhere:
            home = self.home(number)
            if home is not None:
                yield home

    def home(self, number: int) -> Home | None:
        """A reservation at home here, with its parts, if it has any."""
        record = self._records.get(number)
        if record is None or number in self._links:
            return None
        parts = self._elsewhere.get(number, {})
        return Home(number, record.status, record.version, record.expires_at_ms, number in self._owed, parts)

    def newest(self) -> int:
        """The number of the record made last. 0: none."""
        return self._numbers[-1] if self._numbers else 0

    def knew(self, number: int) -> bool:
        """Whether the record with this number could have been made here by now, and may have been forgotten since."""
        return number >> HASH_BITS <= self._seq

    def has_left(self, number: int) -> bool:
        """Whether a part, or a reservation with parts, was forgotten while it took units."""
        return number in self._left

    # --- findings -----------------------------------------------------------------------------------------------------

    def _find(
        self,
        what: Rule,
        detail: str,
        *,
        counter: _Counter | None = None,
        number: int | None = None,
        seq: int | None = None,
    ) -> None:
        self._findings_count += 1
        if len(self.findings) < FINDINGS_MAX:
            name = None if counter is None else counter.name
            self.findings.append(Finding(self._seq if seq is None else seq, what, name, number, detail))

    # --- holds that are due -------------------------------------------------------------------------------------------

    def _is_due(self, number: int, record: _Record, expires_at_ms: int) -> bool:
        """Whether it is a hold that should have expired by now. What is pinned waits for its home."""
        if record.status != HELD or record.expires_at_ms != expires_at_ms or expires_at_ms > self._at_ms:
            return False
        link = self._links.get(number) if self._links else None
        return link is None or not link.is_pinned

    def _pass_over_what_is_done(self) -> None:
        """Take from the front of the heap what has expired or was never to: it would grow with the journal."""
        due = self._due
        while due and due[0] >> _NUMBER_BITS <= self._at_ms:
            record = self._records.get(due[0] & _NUMBER_MASK)
            if record is not None and self._is_due(due[0] & _NUMBER_MASK, record, due[0] >> _NUMBER_BITS):
                return
            heapq.heappop(due)

    def _count_overdue_holds(self) -> None:
        """Bring `_Counter.overdue` up to now. Each hold is counted once, however many are refused meanwhile."""
        due = self._due
        while due and due[0] >> _NUMBER_BITS <= self._at_ms:
            entry = heapq.heappop(due)
            number = entry & _NUMBER_MASK
            record = self._records.get(number)
            if record is not None and self._is_due(number, record, entry >> _NUMBER_BITS):
                self._overdue.add(number)
                for row, units in record.lines:
                    self._counters[row].overdue += units

    def _no_longer_overdue(self, number: int, record: _Record) -> None:
        """A hold that `_overdue` may name is about to change: with the lines and the status that it was counted with."""
        if number in self._overdue:
            self._overdue.remove(number)
            for row, units in record.lines:
                self._counters[row].overdue -= units

    def _check_not_due(self, number: int, record: _Record) -> None:
        """A step must not find its hold due."""
        if record.expires_at_ms <= self._at_ms and self._is_due(number, record, record.expires_at_ms):
            detail = f"a step at {self._at_ms} ms, but this hold was due at {record.expires_at_ms} ms"
            self._find(Rule.HOLD_OVERDUE, detail, number=number)

    # --- counters -----------------------------------------------------------------------------------------------------

    def _lines(
        self, lines: list[events.CounterUnits], number: int | None, *, may_be_none: bool = False
    ) -> Lines | None:
        """The lines, or None and a finding where they name no counter, a counter twice, or no units."""
        known = len(self._counters)
        for row, units in lines:
            if not 0 <= row < known or units <= 0:
                self._find(Rule.EVENT_MALFORMED, f"{units} units of counter row {row} of {known}", number=number)
                return None
        if (not lines and not may_be_none) or (len(lines) > 1 and len(dict(lines)) < len(lines)):
            self._find(Rule.EVENT_MALFORMED, f"no lines, or a counter twice: {lines}", number=number)
            return None
        return tuple(lines)

    def _check_open(self, counter: _Counter, number: int) -> None:
        """What takes or confirms units must meet an open counter before its cut-off."""
        if counter.closed:
            self._find(Rule.TAKEN_WHILE_CLOSED, "the counter is closed", counter=counter, number=number)
        if self._at_ms >= counter.cutoff_at_ms:
            detail = f"at {self._at_ms} ms, cut-off at {counter.cutoff_at_ms} ms"
            self._find(Rule.TAKEN_PAST_CUTOFF, detail, counter=counter, number=number)

    def _take_units(self, lines: Lines, status: int, number: int) -> None:
        for row, units in lines:
            counter = self._counters[row]
            taken = counter.units
            taken[status] += units
            if taken[0] + taken[1] + taken[2] > counter.limit:
                detail = f"{units} units taken: used {sum(taken)}, limit {counter.limit}"
                self._find(Rule.LIMIT_PASSED, detail, counter=counter, number=number)
            if counter.closed or self._at_ms >= counter.cutoff_at_ms:
                self._check_open(counter, number)

    def _give_back(self, lines: Lines, status: int, number: int) -> None:
        for row, units in lines:
            self._give_back_of(self._counters[row], units, status, number)

    def _give_back_of(self, counter: _Counter, units: int, status: int, number: int) -> None:
        counter.units[status] -= units
        if counter.units[status] < 0:
            self._find(Rule.UNITS_BELOW_ZERO, f"{STATUS_WORDS[status]} units", counter=counter, number=number)
        if counter.overcommitment is not None:
            self._settle(counter)

    def _settle(self, counter: _Counter) -> None:
        """Close the overcommitment of a counter where its units fit again."""
        index = counter.overcommitment
        if index is not None and sum(counter.units) <= counter.limit:
            self.overcommitments[index] = self.overcommitments[index]._replace(until_seq=self._seq)
            counter.overcommitment = None

    # --- reservations -------------------------------------------------------------------------------------------------

    def _step(self, number: int, verb: str) -> tuple[_Record, int] | None:
        """The record a step changes and the status it had, moved on; or None and a finding where the step is illegal."""
        record = self._records.get(number)
        if record is None:
            self._find(Rule.UNKNOWN_RESERVATION, f"{verb}: never made, or forgotten", number=number)
            return None
        was = record.status
        to = STEPS.get((was, verb))
        if to is None:
            self._find(Rule.STEP_ILLEGAL, f"{verb} of what is {STATUS_WORDS[was]}", number=number)
            return None
        if self._links and number in self._links and verb != "expire":
            self._find(Rule.STEP_ILLEGAL, f"{verb} of a part, which follows its home", number=number)
            return None
        if was == HELD:
            if verb != "expire":
                self._check_not_due(number, record)
            if self._overdue:
                self._no_longer_overdue(number, record)
        record.status = to
        record.changed_at_ms = self._at_ms
        record.version += 1
        if self._elsewhere and number in self._elsewhere:
            self._owed.add(number)
        return record, was

    def _make(self, event: events.Held | events.ConfirmedAtOnce, status: int, expires_at_ms: int) -> None:
        lines = self._lines(event.lines, None)
        if lines is None:
            return
        number = reservation_number(self._seq, self._counters[lines[0][0]].hashed)
        try:
            key = bytes.fromhex(event.key)
        except ValueError:
            self._find(Rule.EVENT_MALFORMED, f"the key {event.key!r} is not hex", number=number)
            return
        if key in self._keys:
            self._find(Rule.KEY_USED_TWICE, f"key {event.key} has a live record", number=number)
        self._keys.add(key)
        self._records[number] = _Record(status, lines, expires_at_ms, self._at_ms, key)
        self._numbers.append(number)
        if event.parts:
            self._set_parts(number, event.parts)
        self._take_units(lines, status, number)
        if status == HELD:
            self._await_expiry(number, expires_at_ms)

    def _await_expiry(self, number: int, expires_at_ms: int) -> None:
        heapq.heappush(self._due, expires_at_ms << _NUMBER_BITS | number)

    def _held(self, event: events.Held) -> None:
        self._make(event, HELD, event.expires_at_ms)

    def _confirmed_at_once(self, event: events.ConfirmedAtOnce) -> None:
        self._make(event, CONFIRMED, 0)

    def _confirmed(self, event: events.Confirmed) -> None:
        kept = None
        if event.kept is not None:
            kept = self._lines(event.kept, event.number, may_be_none=_takes_any(event.parts))
            if kept is None:
                return
        step = self._step(event.number, "confirm late" if event.late else "confirm")
        if step is None:
            return
        record, _ = step
        had = dict(record.lines)
        if event.parts is not None:
            self._check_kept_elsewhere(event.number, event.parts)
            self._set_parts(event.number, event.parts)
        if kept is not None:
            if any(units > had.get(row, 0) for row, units in kept):
                detail = f"kept {kept} of {record.lines}"
                self._find(Rule.KEPT_MORE_THAN_HELD, detail, number=event.number)
            record.lines = kept
        if event.late:
            self._take_units(record.lines, CONFIRMED, event.number)
            return
        for row, units in record.lines:
            counter = self._counters[row]
            counter.units[CONFIRMED] += units
            self._check_open(counter, event.number)
        self._give_back(tuple(had.items()), HELD, event.number)

    def _released(self, event: events.Released) -> None:
        step = self._step(event.number, "release")
        if step is not None:
            self._give_back(step[0].lines, step[1], event.number)

    def _extended(self, event: events.Extended) -> None:
        step = self._step(event.number, "extend")
        if step is None:
            return
        record, _ = step
        if event.expires_at_ms < record.expires_at_ms:
            detail = f"from {record.expires_at_ms} ms to {event.expires_at_ms} ms"
            self._find(Rule.HOLD_SHORTENED, detail, number=event.number)
        if event.expires_at_ms != record.expires_at_ms:
            record.expires_at_ms = event.expires_at_ms
            self._await_expiry(event.number, event.expires_at_ms)

    def _moved(self, event: events.Moved) -> None:
        """Only what rises is taken: the units a reservation has count as its own."""
        lines = self._lines(event.lines, event.number, may_be_none=_takes_any(event.parts))
        if lines is None:
            return
        step = self._step(event.number, "move")
        if step is None:
            return
        record, status = step
        if event.parts is not None:
            self._set_parts(event.number, event.parts)
        self._exchange(record, lines, status, event.number)

    def _exchange(self, record: _Record, lines: Lines, status: int, number: int) -> None:
        """Take other lines: what rises is taken, what falls is given back."""
        rest = dict(record.lines)
        record.lines = lines
        for row, units in lines:
            more = units - rest.pop(row, 0)
            if more > 0:
                self._take_units(((row, more),), status, number)
            elif more < 0:
                self._give_back_of(self._counters[row], -more, status, number)
        self._give_back(tuple(rest.items()), status, number)

    def _fulfilled(self, event: events.Fulfilled) -> None:
        step = self._step(event.number, "fulfil")
        if step is None:
            return
        for row, units in step[0].lines:
            self._counters[row].units[FULFILLED] += units
        self._give_back(step[0].lines, CONFIRMED, event.number)

    def _expired(self, event: events.Expired) -> None:
        if len(event.numbers) != len(event.expired_at_ms):
            self._find(Rule.EVENT_MALFORMED, f"{len(event.numbers)} holds, {len(event.expired_at_ms)} times")
            return
        for number, expired_at_ms in zip(event.numbers, event.expired_at_ms, strict=True):
            step = self._step(number, "expire")
            if step is None:
                continue
            record, _ = step
            if expired_at_ms != record.expires_at_ms:
                detail = f"expired at {expired_at_ms} ms, due at {record.expires_at_ms} ms"
                self._find(Rule.EXPIRED_AT_ANOTHER_TIME, detail, number=number)
            if self._at_ms < expired_at_ms:
                detail = f"at {self._at_ms} ms, due at {expired_at_ms} ms"
                self._find(Rule.EXPIRED_TOO_EARLY, detail, number=number)
            if self._links and number in self._links and self._links[number].is_pinned:
                self._find(Rule.EXPIRED_WHILE_PINNED, "its home has not said what became of it", number=number)
            self._give_back(record.lines, HELD, number)

    def _refused(self, event: events.Refused) -> None:
        """The first counter named is the one whose rule is the reason. In a move, units had count as free: none is less."""
        known = len(self._counters)
        if not event.counters or any(not 0 <= row < known or units <= 0 for row, units, _ in event.counters):
            self._find(Rule.EVENT_MALFORMED, f"refused {event.counters} of {known} counters")
            return
        row, asked, _ = event.counters[0]
        counter = self._counters[row]
        room = counter.limit - sum(counter.units)
        cause = {
            "slot_closed": counter.closed,
            "past_cutoff": self._at_ms >= counter.cutoff_at_ms,
            "insufficient_capacity": asked > room,
        }
        available = event.counters[0][2]
        if event.reason == "insufficient_capacity" and self._shards > 1 and available < asked <= room:
            self._refused_beside_attempts += 1
        elif not cause.get(event.reason, False):
            detail = f"{event.reason}, but {asked} units asked of {room}, closed {counter.closed}"
            self._find(Rule.REFUSED_WITHOUT_CAUSE, detail, counter=counter)
        if event.reason == "insufficient_capacity":
            self._count_overdue_holds()
        for row, asked, _ in event.counters:
            counter = self._counters[row]
            counter.refused += asked
            if event.reason == "insufficient_capacity" and counter.overdue:
                detail = f"{asked} units refused at {self._at_ms} ms, but {counter.overdue} units of holds were due"
                self._find(Rule.HOLD_OVERDUE, detail, counter=counter)

    # --- over several shards ------------------------------------------------------------------------------------------

    def _set_parts(self, number: int, parts: list[events.PartUnits]) -> None:
        """At home: what a reservation takes elsewhere from now on."""
        named = {shard: (part_number, _by_name(lines)) for shard, part_number, lines in parts}
        if len(named) < len(parts) or any(part_number <= 0 for part_number, _ in named.values()):
            self._find(Rule.EVENT_MALFORMED, f"a shard twice, or a part without a number: {parts}", number=number)
        for shard, (part_number, _) in self._elsewhere.get(number, {}).items():
            if named.get(shard, (0,))[0] != part_number:
                detail = f"part {part_number} on shard {shard} is neither kept nor given up"
                self._find(Rule.PART_LEFT_OUT, detail, number=number)
        self._elsewhere[number] = named
        self._owed.add(number)

    def _check_kept_elsewhere(self, number: int, parts: list[events.PartUnits]) -> None:
        had = self._elsewhere.get(number, {})
        for shard, _, lines in parts:
            there = had.get(shard, (0, {}))[1]
            if any(units > there.get(name, 0) for name, units in _by_name(lines).items()):
                detail = f"kept {lines} of {there} on shard {shard}"
                self._find(Rule.KEPT_MORE_THAN_HELD, detail, number=number)

    def _part_prepared(self, event: events.PartPrepared) -> None:
        lines = self._lines(event.lines, event.part_number or None)
        if lines is None:
            return
        number = event.part_number
        if not number:
            number = reservation_number(self._seq, self._counters[lines[0][0]].hashed)
            self._records[number] = _Record(HELD, (), 0, self._at_ms, b"")
            self._links[number] = _Link(event.home_shard, event.tx, event.number, 0, is_pinned=True)
            self._numbers.append(number)
        record, link = self._records.get(number), self._links.get(number)
        if record is None or link is None:
            self._find(Rule.UNKNOWN_RESERVATION, "prepared: never made, no part, or forgotten", number=number)
            return
        if event.home_shard != link.home_shard or link.reservation not in (0, event.number):
            detail = (
                f"of {link.reservation} on shard {link.home_shard}, prepared for {event.number} on {event.home_shard}"
            )
            self._find(Rule.PART_OF_ANOTHER, detail, number=number)
        if 0 < (link.tx - event.tx) % 2**63 < 2**62 or event.version < link.version or record.status == FULFILLED:
            detail = f"attempt {event.tx} after {link.tx}, version {event.version} after {link.version}"
            self._find(Rule.PREPARED_TOO_LATE, detail, number=number)
        self._check_not_due(number, record)
        self._no_longer_overdue(number, record)
        link.tx, link.reservation, link.is_pinned = event.tx, event.number, True
        if record.status in (RELEASED, EXPIRED):
            record.status, record.lines = HELD, ()
        now = dict(lines)
        if any(units > now.get(row, 0) for row, units in record.lines):
            self._find(Rule.PART_GAVE_UP_UNITS, f"{record.lines} before, {lines} prepared", number=number)
        record.changed_at_ms = self._at_ms
        self._exchange(record, lines, record.status, number)

    def _part_synced(self, event: events.PartSynced) -> None:
        number = event.part_number
        record, link = self._records.get(number), self._links.get(number)
        lines = self._lines(event.lines, number, may_be_none=True)
        to = event.status - 1
        if record is None or link is None or lines is None or not HELD <= to <= EXPIRED:
            if lines is not None:
                detail = f"synced: never made, no part, or forgotten; status {event.status}"
                self._find(Rule.UNKNOWN_RESERVATION, detail, number=number)
            return
        if event.version < link.version or (event.version == link.version and not link.is_pinned):
            self._find(Rule.PART_WENT_BACK, f"version {event.version} after {link.version}", number=number)
        if link.reservation not in (0, event.number):
            self._find(Rule.PART_OF_ANOTHER, f"of {link.reservation}, synced with {event.number}", number=number)
        self._no_longer_overdue(number, record)
        link.version, link.reservation, link.is_pinned = event.version, event.number, False
        had = dict(record.lines) if record.status <= FULFILLED else {}
        if to <= FULFILLED and any(units > had.get(row, 0) for row, units in lines):
            self._find(Rule.PART_TOOK_UNPREPARED, f"{had} before, {lines} synced", number=number)
        if to <= FULFILLED:
            for row, units in lines:
                counter = self._counters[row]
                counter.units[to] += units
                if units > had.get(row, 0) and sum(counter.units) - had.get(row, 0) > counter.limit:
                    detail = f"{units} units synced: used {sum(counter.units) - had.get(row, 0)}, limit {counter.limit}"
                    self._find(Rule.LIMIT_PASSED, detail, counter=counter, number=number)
        if record.status <= FULFILLED:
            self._give_back(record.lines, record.status, number)
        record.status, record.lines, record.expires_at_ms = to, lines, event.expires_at_ms
        record.changed_at_ms = self._at_ms
        if to == HELD:
            self._await_expiry(number, event.expires_at_ms)

    def _parts_settled(self, event: events.PartsSettled) -> None:
        record = self._records.get(event.number)
        if record is None or event.number not in self._owed or record.version != event.version:
            version = None if record is None else record.version
            owed = "owed" if event.number in self._owed else "not owed"
            detail = f"version {event.version} settled, the last is {version}, {owed}"
            self._find(Rule.SETTLED_ANOTHER_VERSION, detail, number=event.number)
        self._owed.discard(event.number)
        parts = {shard: part for shard, part in self._elsewhere.pop(event.number, {}).items() if part[1]}
        if parts:
            self._elsewhere[event.number] = parts

    # --- plans, terms, upkeep -----------------------------------------------------------------------------------------

    def _term_started(self, event: events.TermStarted) -> None:
        term = (event.epoch, event.restart)
        if term <= self._term:
            self._find(Rule.TERM_NOT_RISEN, f"{term} comes after {self._term}")
        self._term = term

    def _planned(self, planning_seq: int) -> None:
        if planning_seq <= self._planning_seq:
            self._find(Rule.PLANNING_SEQ_NOT_RISEN, f"{planning_seq} comes after {self._planning_seq}")
        self._planning_seq = planning_seq

    def _pool_defined(self, event: events.PoolDefined) -> None:
        self._planned(event.planning_seq)
        self._pool_of_code[event.pool_code] = event.pool_id
        for row, cutoff_at_ms in event.cutoffs:
            if 0 <= row < len(self._counters) and self._counters[row].name[0] == event.pool_id:
                self._counters[row].cutoff_at_ms = cutoff_at_ms
            else:
                self._find(Rule.EVENT_MALFORMED, f"pool {event.pool_id} has no counter row {row}")

    def _counters_defined(self, event: events.CountersDefined) -> None:
        self._planned(event.planning_seq)
        for pool_code, slot_id, base, overbook, buffer, closed, _, ends_at_ms, cutoff_at_ms in event.counters:
            pool_id = self._pool_of_code.get(pool_code)
            if pool_id is None:
                self._find(Rule.UNKNOWN_POOL, f"pool code {pool_code}, slot {slot_id}")
                continue
            name = (pool_id, slot_id)
            row = self._row_of_counter.setdefault(name, len(self._counters))
            if row == len(self._counters):
                self._counters.append(_Counter(name, ends_at_ms))
            counter = self._counters[row]
            counter.base = base
            counter.limit = max(0, base + overbook - buffer)
            counter.closed = closed
            counter.cutoff_at_ms = cutoff_at_ms
            self._overcommit(counter)

    def _overcommit(self, counter: _Counter) -> None:
        """After a plan: end the overcommitment there was under the plan before, list the one there is now."""
        used = sum(counter.units)
        index = counter.overcommitment
        if index is not None:
            if used > counter.limit == self.overcommitments[index].limit:
                return
            self.overcommitments[index] = self.overcommitments[index]._replace(until_seq=self._seq)
            counter.overcommitment = None
        if used > counter.limit:
            counter.overcommitment = len(self.overcommitments)
            self.overcommitments.append(Overcommitment(self._seq, counter.name, used, counter.limit, None))

    def _forgotten(self, event: events.Forgotten) -> None:
        """Drop what the event names: finished before, or confirmed for slots that had all ended before."""
        start = bisect_left(self._numbers, event.first)
        for number in self._numbers[start : bisect_right(self._numbers, event.last)]:
            record = self._records.get(number)
            if record is None or number in self._owed or not self._may_leave(number):
                continue
            if record.status >= FULFILLED:
                leaves = record.changed_at_ms < event.before_ms
            else:
                leaves = record.status == CONFIRMED and self._ended_before(number, record, event.before_ms)
            if not leaves:
                continue
            del self._records[number]
            self._keys.discard(record.key)
            is_shared = self._links.pop(number, None) is not None
            is_shared |= self._elsewhere.pop(number, None) is not None
            if is_shared and record.status <= FULFILLED:
                self._left.add(number)
            if record.status <= FULFILLED:
                for row, units in record.lines:
                    self._counters[row].left[record.status] += units
        if len(self._numbers) > 2 * len(self._records):
            self._numbers = array("q", self._records)

    def _ended_before(self, number: int, record: _Record, before_ms: int) -> bool:
        """Whether every slot had ended: of parts elsewhere the date is known, and two days later it is over anywhere."""
        for row, _ in record.lines:
            if self._counters[row].ends_at_ms >= before_ms:
                return False
        elsewhere = [slot_id for _, lines in self._elsewhere.get(number, {}).values() for _, slot_id in lines]
        if not record.lines and not elsewhere:
            return False
        oldest = _date(before_ms - 2 * _DAY_MS)
        return all(slot_id.partition("T")[0] < oldest for slot_id in elsewhere)

    def _may_leave(self, number: int) -> bool:
        link = self._links.get(number)
        return link is None or not link.is_pinned


def _by_name(lines: list[events.NamedUnits]) -> dict[CounterName, int]:
    return {(pool_id, slot_id): units for pool_id, slot_id, units in lines}


def _date(at_ms: int) -> str:
    """The UTC date of an instant, as slot ids begin with it."""
    span = timedelta(days=min(max(at_ms // _DAY_MS, 0), _DAYS_MAX))
    return (date(1970, 1, 1) + span).isoformat()


def _takes_any(parts: list[events.PartUnits] | None) -> bool:
    """Whether a reservation takes something elsewhere, so that it may take nothing here."""
    return parts is not None and any(lines for _, _, lines in parts)
