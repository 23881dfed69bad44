"""Bugs to plant, by name: each takes away one rule of the protocol, and the simulation must notice.

The first are mistakes that this protocol invites. The others were made, and found by reading or by a seed: they stay here so
that they cannot come back unnoticed.
"""

from collections.abc import Callable
from typing import Any

import pytest

from engine.core import commands, events, ledger, outcomes
from engine.core.columns import HELD, RELEASED
from engine.core.coordinator import Coordinator, Effects, Message
from engine.core.ledger import Ledger
from tests.sim.world import Node

Plant = Callable[[pytest.MonkeyPatch], None]

BUGS: dict[str, Plant] = {}
MADE: dict[str, Plant] = {}


def bug(plant: Plant) -> Plant:
    """A bug that the protocol invites."""
    BUGS[plant.__name__] = plant
    return plant


def made(plant: Plant) -> Plant:
    """A bug that once was in the code."""
    MADE[plant.__name__] = plant
    return plant


def _after_replay(patch: pytest.MonkeyPatch, forget: Callable[[Ledger], None]) -> None:
    recovered = Node.recovered

    def forgetful(self: Node) -> Ledger:
        state = recovered(self)
        forget(state)
        return state

    patch.setattr(Node, "recovered", forgetful)


@bug
def a_participant_forgets_what_is_pinned_when_it_restarts(patch: pytest.MonkeyPatch) -> None:
    def forget(state: Ledger) -> None:
        state.pinned.clear()
        for number, link in state.links.items():
            state.links[number] = link._replace(is_pinned=False)

    _after_replay(patch, forget)


@bug
def a_participant_does_not_ask_after_a_restart(patch: pytest.MonkeyPatch) -> None:
    _after_replay(patch, lambda state: state.pinned.clear())


@bug
def a_home_sends_news_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    follow = Node._follow

    def hasty(self: Node, effects: Effects) -> None:
        follow(self, effects)
        for number in dict.fromkeys(self.ledger.news):
            for message in self.coordinator.news(self.ledger, number, self.monotonic_ms()):
                self.transmit(message.shard, message.command)
        self.ledger.news.clear()

    patch.setattr(Node, "_follow", hasty)


@bug
def a_participant_answers_before_its_commit(patch: pytest.MonkeyPatch) -> None:
    take = Node.take

    def hasty(self: Node, frame: Any) -> None:
        take(self, frame)
        replies, self.replies = self.replies, []
        for answer, reply in replies:
            answer(reply)

    patch.setattr(Node, "take", hasty)


@bug
def a_pinned_hold_expires(patch: pytest.MonkeyPatch) -> None:
    def is_due(state: Ledger, number: int, expires_at_ms: int) -> bool:
        found = state.reservations.find(number)
        return (
            found is not None
            and found[0].status[found[1]] == HELD
            and found[0].expires_at_ms[found[1]] == expires_at_ms
        )

    patch.setattr(ledger, "_is_due", is_due)


@bug
def a_running_attempt_is_said_never_to_have_been(patch: pytest.MonkeyPatch) -> None:
    def doubt(self: Coordinator, state: Ledger, asked: commands.Doubt) -> Effects:
        number = asked.number or self._number_of_part(state, asked.shard, asked.part_number)
        return Effects(messages=(self._state_of(state, asked.shard, asked.part_number, number, asked.tx),))

    patch.setattr(Coordinator, "doubt", doubt)


@bug
def a_home_does_not_tell_after_a_restart_what_it_owes(patch: pytest.MonkeyPatch) -> None:
    _after_replay(patch, lambda state: state.owed.clear())


@bug
def stale_news_is_taken_over(patch: pytest.MonkeyPatch) -> None:
    decide = ledger._DECIDE[commands.Sync]

    def gullible(state: Ledger, command: commands.Sync, now_ms: int, rules: ledger.Rules) -> ledger.Decision:
        link = state.links.get(command.part_number)
        if link is None:
            return decide(state, command, now_ms, rules)
        lines = ledger._counter_rows(state, command.lines)
        assert isinstance(lines, dict)
        event = events.PartSynced(
            command.part_number, command.number, command.version, command.status, command.expires_at_ms,
            list(lines.items()),
        )  # fmt: skip
        return outcomes.Synced(state.seq + 1, command.part_number, command.version), (event,)

    patch.setitem(ledger._DECIDE, commands.Sync, gullible)


@bug
def a_home_decides_without_waiting_for_all(patch: pytest.MonkeyPatch) -> None:
    prepared = Coordinator.prepared

    def impatient(self: Coordinator, state: Ledger, shard: int, asked: commands.Prepare, *rest: Any) -> Effects:
        attempt = self._attempts.get(asked.tx)
        if attempt is not None and shard in attempt.silent and isinstance(rest[0], outcomes.Prepared):
            for other in attempt.silent - {shard}:
                attempt.parts.setdefault(other, 1)
            attempt.silent = {shard}
        return prepared(self, state, shard, asked, *rest)

    patch.setattr(Coordinator, "prepared", impatient)


@bug
def an_attempt_that_is_given_up_takes_no_units_back(patch: pytest.MonkeyPatch) -> None:
    """Neither recalled nor doubted."""
    patch.setattr(Coordinator, "_recalls", lambda *_: ())
    patch.setattr(Coordinator, "doubt", lambda *_: Effects())


@made
def a_prepare_of_an_attempt_that_is_over_pins_again(patch: pytest.MonkeyPatch) -> None:
    decide = ledger._DECIDE[commands.Prepare]

    def gullible(state: Ledger, command: commands.Prepare, now_ms: int, rules: ledger.Rules) -> ledger.Decision:
        key = ledger._part_key(command.key)
        number = command.part_number or ledger._unborn_part(state, key, command)
        link = state.links.get(number)
        if link is None or (link.is_pinned and link.tx == command.tx):
            return decide(state, command, now_ms, rules)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(ledger, "_is_older", lambda *_: False)
            state.links[number] = link._replace(tx=command.tx + 1, version=0)
            reply, made_events = decide(state, command, now_ms, rules)
            state.links[number] = link
            return reply, made_events

    patch.setitem(ledger._DECIDE, commands.Prepare, gullible)


@made
def a_repeated_yes_is_answered_with_never(patch: pytest.MonkeyPatch) -> None:
    prepared = Coordinator.prepared

    def forgetful(self: Coordinator, state: Ledger, shard: int, asked: commands.Prepare, *rest: Any) -> Effects:
        if asked.tx not in self._attempts and isinstance(rest[0], outcomes.Prepared):
            return Effects(messages=(self._state_of(state, shard, rest[0].part_number, asked.number, asked.tx),))
        return prepared(self, state, shard, asked, *rest)

    patch.setattr(Coordinator, "prepared", forgetful)


@made
def a_part_not_named_is_released_at_version_0_and_that_is_old(patch: pytest.MonkeyPatch) -> None:
    state_of = Coordinator._state_of

    def at_version_0(self: Coordinator, state: Ledger, shard: int, part_number: int, number: int, tx: int) -> Message:
        message = state_of(self, state, shard, part_number, number, tx)
        listed = any(part.shard == shard and part.number == part_number for part in state.parts.get(number, ()))
        if listed:
            return message
        sync = commands.Sync(tx, part_number, number, 0, RELEASED, 0, [])
        return Message(shard, sync, after_commit=True)

    decide = ledger._DECIDE[commands.Sync]

    def strict(state: Ledger, command: commands.Sync, now_ms: int, rules: ledger.Rules) -> ledger.Decision:
        link = state.links.get(command.part_number)
        if link is not None and command.version == 0 and link.version > 0:
            return outcomes.Synced(state.seq, command.part_number, link.version), ()
        return decide(state, command, now_ms, rules)

    patch.setattr(Coordinator, "_state_of", at_version_0)
    patch.setitem(ledger._DECIDE, commands.Sync, strict)


@made
def news_that_comes_after_its_time_holds_units(patch: pytest.MonkeyPatch) -> None:
    decide = ledger._DECIDE[commands.Sync]

    def timeless(state: Ledger, command: commands.Sync, now_ms: int, rules: ledger.Rules) -> ledger.Decision:
        del now_ms
        return decide(state, command, 0, rules)

    patch.setitem(ledger._DECIDE, commands.Sync, timeless)
