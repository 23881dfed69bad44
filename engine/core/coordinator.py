"""Reservations over several shards, all or nothing: the side of the home that decides.

Theory of operation
- The shard of a reservation's first line is its *home*. The home decides; the other shards hold *parts*.
- A step that needs units or time elsewhere (hold, confirm, extend, move) is an *attempt*: the home checks its own
  side, asks every other shard to **prepare** (journaled there: units taken, *pinned*, never expiring by itself), and
  when all have agreed it decides as it would alone, in one journaled event. That event is the decision. One refusal,
  or silence, and nothing happened.
- A step that needs nobody's consent (release, fulfil, expiry) is decided at once.
- After each change of a reservation with parts, its home **owes** the other shards the news. It sends the state
  itself, not the step (**sync**: version, status, lines), again until each has answered, and then journals that all
  is settled. What is owed follows from the journal, so a crash forgets nothing. A shard takes over newer versions and
  ignores older ones, so messages may be lost, repeated and reordered.
- A shard with a pinned part that hears nothing asks (**doubt**). The home answers with the state of the reservation;
  of an attempt that it neither has under way nor has decided it says that it never was (version 0). It need not
  journal that: attempts are named by term, and none of an ended term can still be decided.
- A part tells old messages from new ones by two numbers. The number of an attempt rises: an older one pins nothing any
  more. The version of the reservation rises: news up to the version that an attempt started from does not say what became
  of it, and a version counts as taken over only when its content was (the one in a prepare may die with its home).
- Attempts live in memory only. Their units count (`Ledger.attempted_units`) but are not journaled: a home that
  crashes forgets them, and the shards they pinned ask. A client's retry under the same key takes such a part over.

So no crash oversells (units are taken before anybody says yes), loses (the decision is one event) or half-books (the
rest is owed until it is done).

Rules: at most one attempt for each reservation; other steps wait behind it. Expiry of the hold at home ends the
attempt. Messages that tell of a decision leave after its commit (`Message.after_commit`), since it must not be known
elsewhere before it is durable.

Not promised: fairness between attempts, or an answer from a shard that is down (the attempt ends after its deadline).
"""

from typing import Any, NamedTuple

from engine.core import commands, events, ledger, outcomes
from engine.core.columns import CONFIRMED, HELD, RELEASED
from engine.core.ledger import Ledger, Part, Rules
from engine.core.outcomes import Outcome
from engine.core.sharding import shard_of_counter

Waiter = Any
"""Whoever waits for an answer; only the shell knows what it is."""

ATTEMPT_MS_MAX = 2_000
"""An attempt that takes longer meets a shard that is down: its units are given free again."""
ASK_AGAIN_MS = 250
"""News and doubts that have not been answered are sent again after this: a restart takes about as long."""
WAITING_STEPS_MAX = 8
"""Steps that wait for an attempt on the same reservation."""
ATTEMPTS_MAX = 8_192
SENT_IN_TICK_MAX = 1_000

_TX_BITS = 63
_TX_RESTART_BITS = 18
_TX_COUNT_BITS = 36
"""Numbers of attempts rise for years at a thousand restarts a day and ten thousand attempts a second; a part can then tell
a late message of an attempt that is over."""


class Message(NamedTuple):
    """A command for another shard's worker."""

    shard: int
    command: commands.Prepare | commands.Sync | commands.Doubt
    after_commit: bool


class Answer(NamedTuple):
    """A reply for whoever waits. It leaves with the batch, like all replies."""

    waiter: Waiter
    reply: outcomes.Reply


class Effects(NamedTuple):
    """What a step led to. The shell applies the events at once, in order, before it calls again."""

    made: tuple[events.ShardEvent, ...] = ()
    answers: tuple[Answer, ...] = ()
    messages: tuple[Message, ...] = ()
    again: "tuple[Request, ...]" = ()
    """Steps that waited for an attempt that has ended: the shell submits them now."""


class Request(NamedTuple):
    """A client's command with its deadline."""

    command: commands.ShardCommand
    deadline_ms: int
    """Monotonic."""
    waiter: Waiter


class _Attempt:
    """What the home tries to do, until it is decided or given up."""

    __slots__ = ("deadline_ms", "number", "own_units", "parts", "requests", "silent", "tx", "waiting", "wanted")

    def __init__(self, tx: int, request: Request, number: int, deadline_ms: int) -> None:
        self.tx = tx
        self.number = number
        self.requests = [request]
        self.deadline_ms = deadline_ms
        self.own_units: dict[int, int] = {}
        self.wanted: dict[int, tuple[tuple[str, str, int], ...]] = {}
        """Lines by shard, all of the part."""
        self.parts: dict[int, int] = {}
        """Part numbers by shard, as far as known."""
        self.silent: set[int] = set()
        """Shards whose consent is still awaited."""
        self.waiting: list[Request] = []

    @property
    def command(self) -> commands.ShardCommand:
        return self.requests[0].command


class Statistics(NamedTuple):
    """What the coordinator has in hand."""

    attempts: int
    """Attempts under way."""
    owed: int
    """Reservations whose last change is not yet known everywhere."""
    pinned: int
    """Parts here whose home has not said what became of them."""


class Coordinator:
    """The volatile side of a home. All that must survive is in the ledger."""

    def __init__(self, shard: int, shards: int) -> None:
        self._shard = shard
        self._shards = shards
        self._attempts: dict[int, _Attempt] = {}
        self._of_number: dict[int, _Attempt] = {}
        self._of_key: dict[bytes, _Attempt] = {}
        self._count = 0
        self._told: dict[int, tuple[int, set[int]]] = {}
        """Of owed reservations: the version sent and the parts that have taken it over."""
        self._sent_ms: dict[int, int] = {}
        self._pinned_since_ms: dict[int, int] = {}

    def statistics(self, state: Ledger) -> Statistics:
        """What it has in hand."""
        return Statistics(len(self._attempts), len(state.owed), len(state.pinned))

    # --- requests -----------------------------------------------------------------------------------------------------

    def concerns(self, state: Ledger, command: commands.ShardCommand) -> bool:
        """Whether this command needs other shards. All others go to `ledger.decide`."""
        if isinstance(command, commands.Hold):
            if len(command.lines) == 1:  # it was routed here by its only line
                return False
            return self._leads_away(command.lines)
        if isinstance(command, commands.Move):
            return command.number in state.parts or command.number in self._of_number or self._leads_away(command.lines)
        if isinstance(command, commands.Confirm | commands.Extend):
            return command.number in state.parts or command.number in self._of_number
        if isinstance(command, commands.Release | commands.Fulfil):
            return command.number in self._of_number
        return False

    def _leads_away(self, lines: list[commands.Line]) -> bool:
        return self._shards > 1 and any(
            shard_of_counter(line.pool_id, line.slot_id, self._shards) != self._shard for line in lines
        )

    def submit(self, state: Ledger, request: Request, now_ms: int, rules: Rules, monotonic_ms: int) -> Effects:
        """Take a command that `concerns` other shards. It is answered now or by a later call."""
        command = request.command
        running = self._running(command)
        if running is not None:
            return self._join(state, running, request)
        if len(self._attempts) >= ATTEMPTS_MAX:
            return _answer(request, outcomes.Refused(state.seq, Outcome.OVERLOADED))
        self._count += 1
        term = state.epoch << _TX_RESTART_BITS | state.restart & (1 << _TX_RESTART_BITS) - 1
        tx = (term << _TX_COUNT_BITS | self._count & (1 << _TX_COUNT_BITS) - 1) & (1 << _TX_BITS) - 1
        deadline_ms = min(request.deadline_ms, monotonic_ms + ATTEMPT_MS_MAX)
        number = 0 if isinstance(command, commands.Hold) else command.number  # type: ignore[union-attr]  # by `concerns`
        attempt = _Attempt(tx, request, number, deadline_ms)
        own, wanted = self._split(state, command)
        attempt.wanted = wanted
        attempt.parts = {part.shard: part.number for part in state.parts.get(number, ())}
        if isinstance(command, commands.Confirm) and command.lines is not None:
            lines_of = {part.shard: _units(part.lines) for part in state.parts.get(number, ())}
            if any(not _within(lines, lines_of.get(shard, {})) for shard, lines in wanted.items()):
                return _answer(request, outcomes.Refused(state.seq, Outcome.LINES_NOT_HELD))
        reply, made = self._decide(state, attempt, own, now_ms, rules)
        if not _is_done(reply) or not made:
            return Effects(made, tuple(Answer(request.waiter, reply) for request in attempt.requests))
        attempt.silent = {shard for shard, lines in wanted.items() if lines}
        if not attempt.silent:
            return Effects(made, (Answer(request.waiter, reply),))
        attempt.own_units = self._own_units(state, command, own)
        for row, units in attempt.own_units.items():
            state.attempted_units[row] = state.attempted_units.get(row, 0) + units
        self._attempts[tx] = attempt
        if number:
            self._of_number[number] = attempt
        if isinstance(command, commands.Hold):
            self._of_key[command.key] = attempt
        return Effects(messages=tuple(self._prepare(state, attempt, shard) for shard in sorted(attempt.silent)))

    def _running(self, command: commands.ShardCommand) -> _Attempt | None:
        if isinstance(command, commands.Hold):
            return self._of_key.get(command.key)
        return self._of_number.get(command.number)  # type: ignore[union-attr]  # by `concerns`

    def _join(self, state: Ledger, attempt: _Attempt, request: Request) -> Effects:
        """The same request again waits for the same answer; another step waits for its turn."""
        first, command = attempt.command, request.command
        if isinstance(first, commands.Hold) and isinstance(command, commands.Hold):
            if first.digest != command.digest:
                return _answer(request, outcomes.Refused(state.seq, Outcome.IDEMPOTENCY_KEY_REUSED))
            attempt.requests.append(request)
            return Effects()
        if type(first) is type(command) and first.action == command.action:  # type: ignore[union-attr]  # steps have one
            attempt.requests.append(request)
            return Effects()
        if len(attempt.waiting) >= WAITING_STEPS_MAX:
            return _answer(request, outcomes.Refused(state.seq, Outcome.OVERLOADED))
        attempt.waiting.append(request)
        return Effects()

    def _split(
        self, state: Ledger, command: commands.ShardCommand
    ) -> tuple[list[commands.Line] | None, dict[int, tuple[tuple[str, str, int], ...]]]:
        """The lines of this shard (None: as they are) and those of each other shard that has to agree."""
        lines = None if isinstance(command, commands.Extend) else command.lines  # type: ignore[union-attr]  # by `concerns`
        if lines is None:
            return None, {part.shard: part.lines for part in state.parts.get(command.number, ())}  # type: ignore[union-attr]  # steps have one
        own: list[commands.Line] = []
        units: dict[int, dict[tuple[str, str], int]] = {}
        for line in lines:
            shard = shard_of_counter(line.pool_id, line.slot_id, self._shards)
            if shard == self._shard:
                own.append(line)
            else:
                counters = units.setdefault(shard, {})
                name = (line.pool_id, line.slot_id)
                counters[name] = counters.get(name, 0) + line.quantity
        return own, {
            shard: tuple((pool_id, slot_id, quantity) for (pool_id, slot_id), quantity in counters.items())
            for shard, counters in units.items()
        }

    def _decide(
        self, state: Ledger, attempt: _Attempt, own: list[commands.Line] | None, now_ms: int, rules: Rules
    ) -> ledger.Decision:
        """What this shard would say alone, with the other shards' parts as they are wanted."""
        command = attempt.command
        parts = tuple(
            Part(shard, attempt.parts.get(shard, 0), lines) for shard, lines in attempt.wanted.items() if lines
        )
        if isinstance(command, commands.Hold):
            mine = commands.Hold(
                own or [], command.ttl_ms, command.key, command.digest, command.order_ref, command.channel
            )
            return ledger.decide_hold(state, mine, now_ms, rules, parts)
        if isinstance(command, commands.Extend):
            return ledger.decide_extend(state, command, now_ms, rules)
        dropped = tuple(
            Part(part.shard, part.number, ())
            for part in state.parts.get(attempt.number, ())
            if part.shard not in attempt.wanted
        )
        if isinstance(command, commands.Confirm):
            step = commands.Confirm(command.number, command.action, own)
            return ledger.decide_confirm(state, step, now_ms, rules, None if own is None else parts + dropped)
        if isinstance(command, commands.Move):
            step_ = commands.Move(command.number, command.action, own or [])
            return ledger.decide_move(state, step_, now_ms, rules, parts + dropped)
        return ledger.decide(state, command, now_ms, rules)

    def _own_units(
        self, state: Ledger, command: commands.ShardCommand, own: list[commands.Line] | None
    ) -> dict[int, int]:
        """Units that the attempt wants here beyond what the reservation has."""
        found = None if isinstance(command, commands.Hold) else state.reservations.find(command.number)  # type: ignore[union-attr]  # by `concerns`
        had: dict[int, int] = {}
        lines: dict[int, int] = {}
        if found is not None:
            chunk, row = found
            lines = dict(state.reservations.lines(chunk, row))
            if chunk.status[row] in (HELD, CONFIRMED):
                had = lines
        if own is not None:
            lines = {}
            for line in own:
                counter = state.counters.find(line.pool_id, line.slot_id)
                if counter is not None:
                    lines[counter] = lines.get(counter, 0) + line.quantity
        return {row: units - had.get(row, 0) for row, units in lines.items() if units > had.get(row, 0)}

    def _prepare(self, state: Ledger, attempt: _Attempt, shard: int) -> Message:
        command = attempt.command
        version, key, order_ref = 0, b"", ""
        if isinstance(command, commands.Hold):
            key, order_ref = command.key, command.order_ref
        else:
            found = state.reservations.find(attempt.number)
            if found is not None:
                chunk, row = found
                version = chunk.version[row]
                key = ledger.key_of(chunk, row)
                order_ref = chunk.label(row)[0]
        lines = [commands.Line(*line) for line in attempt.wanted[shard]]
        prepare = commands.Prepare(
            attempt.tx,
            self._shard,
            attempt.parts.get(shard, 0),
            attempt.number,
            version,
            key,
            lines,
            order_ref,
            isinstance(command, commands.Confirm),
        )
        return Message(shard, prepare, after_commit=False)

    # --- replies ------------------------------------------------------------------------------------------------------

    def prepared(
        self, state: Ledger, shard: int, asked: commands.Prepare, reply: outcomes.Reply, now_ms: int, rules: Rules
    ) -> Effects:
        """Another shard has answered a prepare."""
        attempt = self._attempts.get(asked.tx)
        if attempt is None:
            if isinstance(reply, outcomes.Prepared):
                number = asked.number or self._number_of_part(state, shard, reply.part_number)
                return Effects(messages=(self._state_of(state, shard, reply.part_number, number, asked.tx),))
            return Effects()
        if shard not in attempt.silent:
            return Effects()
        if not isinstance(reply, outcomes.Prepared):
            if isinstance(reply, outcomes.Refused) and reply.outcome not in (
                Outcome.OVERLOADED,
                Outcome.DEADLINE_PASSED,
                Outcome.SHARD_FULL,
            ):
                if asked.is_confirm and reply.outcome is Outcome.INSUFFICIENT_CAPACITY:
                    reply = outcomes.Refused(state.seq, Outcome.HOLD_EXPIRED, reply.counters, reply.detail)
                else:
                    reply = outcomes.Refused(state.seq, reply.outcome, reply.counters, reply.detail)
                return self._give_up(state, attempt, reply)
            return self._give_up(state, attempt, outcomes.Refused(state.seq, Outcome.PARTICIPANT_SILENT))
        attempt.parts[shard] = reply.part_number
        attempt.silent.discard(shard)
        if attempt.silent:
            return Effects()
        self._end(state, attempt)
        own, _ = self._split(state, attempt.command)
        reply, made = self._decide(state, attempt, own, now_ms, rules)
        answers = tuple(Answer(request.waiter, reply) for request in attempt.requests)
        messages = () if _is_done(reply) and made else self._recalls(state, attempt)
        return Effects(made, answers, messages, tuple(attempt.waiting))

    def synced(self, state: Ledger, shard: int, asked: commands.Sync, reply: outcomes.Reply) -> Effects:
        """Another shard has answered news of a reservation."""
        if not isinstance(reply, outcomes.Synced) or asked.version == 0 or asked.number not in state.owed:
            return Effects()
        found = state.reservations.find(asked.number)
        parts = state.parts.get(asked.number, ())
        if found is None or not any(part.shard == shard and part.number == asked.part_number for part in parts):
            return Effects()
        version = found[0].version[found[1]]
        if reply.version < version:
            return Effects()
        told, known = self._told.get(asked.number, (0, set()))
        if told != version:
            known = set()
        known.add(shard)
        self._told[asked.number] = (version, known)
        if any(part.shard not in known for part in parts):
            return Effects()
        self._told.pop(asked.number)
        self._sent_ms.pop(asked.number, None)
        return Effects((events.PartsSettled(asked.number, version),))

    def _end(self, state: Ledger, attempt: _Attempt) -> None:
        """The attempt is over, one way or the other."""
        del self._attempts[attempt.tx]
        self._of_number.pop(attempt.number, None)
        if isinstance(attempt.command, commands.Hold):
            del self._of_key[attempt.command.key]
        for row, units in attempt.own_units.items():
            left = state.attempted_units[row] - units
            if left:
                state.attempted_units[row] = left
            else:
                del state.attempted_units[row]

    def _give_up(self, state: Ledger, attempt: _Attempt, reply: outcomes.Reply) -> Effects:
        self._end(state, attempt)
        answers = tuple(Answer(request.waiter, reply) for request in attempt.requests)
        return Effects((), answers, self._recalls(state, attempt), tuple(attempt.waiting))

    def _recalls(self, state: Ledger, attempt: _Attempt) -> tuple[Message, ...]:
        """Tell the shards that have agreed that nothing came of it. Those not heard of will ask."""
        return tuple(
            self._state_of(state, shard, attempt.parts[shard], attempt.number, attempt.tx)
            for shard, lines in attempt.wanted.items()
            if lines and shard not in attempt.silent
        )

    # --- news ---------------------------------------------------------------------------------------------------------

    def _state_of(self, state: Ledger, shard: int, part_number: int, number: int, tx: int) -> Message:
        """What a part on another shard is by the journal of this one: nothing, where its reservation does not name it."""
        found = state.reservations.find(number) if number else None
        if found is not None:
            for part in state.parts.get(number, ()):
                if part.shard == shard and part.number == part_number:
                    chunk, row = found
                    status = chunk.status[row] if part.lines else RELEASED
                    lines = [commands.Line(*line) for line in part.lines]
                    sync = commands.Sync(
                        tx, part_number, number, chunk.version[row], status, chunk.expires_at_ms[row], lines
                    )
                    return Message(shard, sync, after_commit=True)
        version = 0 if found is None else found[0].version[found[1]]
        return Message(shard, commands.Sync(tx, part_number, number, version, RELEASED, 0, []), after_commit=True)

    def news(self, state: Ledger, number: int, monotonic_ms: int) -> tuple[Message, ...]:
        """Tell the other shards of a reservation's last change, those that do not know it yet."""
        found = state.reservations.find(number)
        if found is None:
            return ()
        version = found[0].version[found[1]]
        told, known = self._told.get(number, (0, set()))
        if told != version:
            known = set()
        self._sent_ms[number] = monotonic_ms
        return tuple(
            self._state_of(state, part.shard, part.number, number, 0)
            for part in state.parts[number]
            if part.shard not in known
        )

    def doubt(self, state: Ledger, asked: commands.Doubt) -> Effects:
        """Another shard asks what became of its pinned part. Silence means: it is still being decided."""
        if asked.tx in self._attempts:
            return Effects()
        number = asked.number or self._number_of_part(state, asked.shard, asked.part_number)
        return Effects(messages=(self._state_of(state, asked.shard, asked.part_number, number, asked.tx),))

    def _number_of_part(self, state: Ledger, shard: int, part_number: int) -> int:
        """The owed reservation that this part belongs to: its home decided, the part has not heard. 0: none."""
        for number in state.owed:
            if any(part.shard == shard and part.number == part_number for part in state.parts[number]):
                return number
        return 0

    # --- time ---------------------------------------------------------------------------------------------------------

    def expired(self, state: Ledger, event: events.Expired) -> Effects:
        """Holds have expired: attempts on them are over. Call after the event is applied."""
        if not self._of_number:
            return Effects()
        answers: tuple[Answer, ...] = ()
        messages: tuple[Message, ...] = ()
        again: tuple[Request, ...] = ()
        for number in event.numbers:
            attempt = self._of_number.get(number)
            if attempt is not None:
                reply = outcomes.Refused(state.seq, Outcome.HOLD_EXPIRED)
                ended = self._give_up(state, attempt, reply)
                answers, messages, again = answers + ended.answers, messages + ended.messages, again + ended.again
        return Effects((), answers, messages, again)

    def tick(self, state: Ledger, monotonic_ms: int) -> Effects:
        """Give up what takes too long, tell again what is owed, ask again about what is pinned."""
        answers: tuple[Answer, ...] = ()
        messages: list[Message] = []
        again: tuple[Request, ...] = ()
        for attempt in [attempt for attempt in self._attempts.values() if attempt.deadline_ms <= monotonic_ms]:
            ended = self._give_up(state, attempt, outcomes.Refused(state.seq, Outcome.PARTICIPANT_SILENT))
            answers += ended.answers
            messages += ended.messages
            again += ended.again
        for number in state.owed:
            if monotonic_ms - self._sent_ms.get(number, -ASK_AGAIN_MS) >= ASK_AGAIN_MS:
                messages += self.news(state, number, monotonic_ms)
                if len(messages) >= SENT_IN_TICK_MAX:
                    break
        for part_number in list(self._pinned_since_ms):
            if part_number not in state.pinned:
                del self._pinned_since_ms[part_number]
        for part_number in state.pinned:
            since_ms = self._pinned_since_ms.setdefault(part_number, monotonic_ms)
            if monotonic_ms - since_ms >= ASK_AGAIN_MS:
                self._pinned_since_ms[part_number] = monotonic_ms
                link = state.links[part_number]
                doubt = commands.Doubt(self._shard, link.tx, part_number, link.number)
                messages.append(Message(link.home_shard, doubt, after_commit=False))
                if len(messages) >= SENT_IN_TICK_MAX:
                    break
        return Effects((), answers, tuple(messages), again)


def _answer(request: Request, reply: outcomes.Reply) -> Effects:
    return Effects(answers=(Answer(request.waiter, reply),))


def _is_done(reply: outcomes.Reply) -> bool:
    """Whether this is the answer to a step that is taken, not to one that is refused or repeated."""
    if isinstance(reply, outcomes.Taken):
        return True
    return isinstance(reply, outcomes.Record) and reply.outcome in (
        Outcome.CONFIRMED,
        Outcome.EXTENDED,
        Outcome.MOVED,
    )


def _units(lines: tuple[tuple[str, str, int], ...]) -> dict[tuple[str, str], int]:
    return {(pool_id, slot_id): units for pool_id, slot_id, units in lines}


def _within(lines: tuple[tuple[str, str, int], ...], held: dict[tuple[str, str], int]) -> bool:
    return all(units <= held.get((pool_id, slot_id), 0) for pool_id, slot_id, units in lines)
