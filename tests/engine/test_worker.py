"""The worker's order of work: durable, then shown, then answered; and what it refuses, frees, forgets and finishes."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import pytest
import trio
import trio.testing

from engine import codec, service, wire
from engine import worker as working
from engine.core import commands, events, ledger, outcomes
from engine.core.columns import EXPIRED
from engine.core.limits import EXPIRED_IN_EVENT_MAX
from engine.core.outcomes import Outcome
from engine.journal.memory import MemoryDisk, open_memory_journal
from engine.journal.sqlite import open_journal
from engine.ports import GENESIS, JournalRow
from engine.snapshot import newest_first
from engine.worker import PUBLISH_ONE_BY_ONE_MAX, Bounds
from readmodel.publisher import Publisher
from readmodel.reader import Reader
from tests.core.shard import EVENING, HOUR_MS, NIGHT, fingerprint, key, outcome_of, replayed, van
from tests.engine.engine_tools import (
    BOUNDS,
    FOREVER_MS,
    PATIENCE_SECONDS,
    Client,
    HeldJournal,
    ManualClock,
    Running,
    counter_plan,
    hold,
    plan,
    running_worker,
    until,
    worker_in_memory,
    worker_on_disk,
)

ROOT = Path(__file__).parents[2]


# --- durable, then shown, then answered ---------------------------------------------------------------------------------


async def test_a_reply_leaves_only_after_its_row_is_durable(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        rows = len(running.journal.rows)
        running.journal.hold()
        asked = await client.send(hold("a"))
        await running.until_appending(rows + 1)
        assert client.silent()
        assert len(running.journal.rows) == rows
        running.journal.free()
        (reply,) = await client.wait(asked)
        assert isinstance(reply, outcomes.Taken)
        row = running.journal.rows[-1]
        assert [event.key for event in codec.decode_shard(row) if isinstance(event, events.Held)] == [key("a").hex()]
        assert reply.seq == row.end.seq


async def test_what_is_shown_is_never_ahead_of_what_is_durable(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        before = running.shown()
        running.journal.hold()
        asked = await client.send(hold("a"))
        await running.until_appending(running.journal.appending + 1)
        assert running.shown() == before
        running.journal.free()
        await client.wait(asked)
        position, row = running.shown()
        assert (position, row.held) == (before[0] + 1, before[1].held + 1)
        assert position == running.journal.head.seq


@pytest.mark.parametrize("counters", [2, PUBLISH_ONE_BY_ONE_MAX + 20], ids=["one by one", "at once"])
async def test_values_of_the_next_batch_do_not_leak_into_a_publication(tmp_path: Path, counters: int) -> None:
    """Two batches change the same counters; while the second waits for the disk, the first is shown, and only that."""
    slots = [f"2026-12-{1 + place // 24:02d}T{place % 24:02d}:00-{place % 24:02d}:30" for place in range(counters)]
    async with worker_on_disk(tmp_path) as running:
        client = await running.client()
        await client.ask(plan()[0])
        await client.ask(commands.PlanCounters(2, [counter_plan(slot_id, 5) for slot_id in slots]))
        running.journal.hold()
        appends = running.journal.appending
        first = await client.send(*(hold(f"1-{slot_id}"[-16:], slot_id=slot_id) for slot_id in slots))
        await running.until_appending(appends + 1)
        second = await client.send(
            *(commands.Hold([van(2, slot_id)], 60_000, key(f"2{slot_id[5:19]}"), 1) for slot_id in slots)
        )
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert [running.shown(slot_id)[1].held for slot_id in slots] == [0] * counters
        running.journal.free()
        running.journal.hold()  # the first commit goes through, the next waits again
        assert {type(reply) for reply in await client.wait(first)} == {outcomes.Taken}
        await running.until_appending(appends + 2)
        assert [running.shown(slot_id)[1].held for slot_id in slots] == [1] * counters
        assert running.position() == running.journal.head.seq
        running.journal.free()
        await client.wait(second)
        assert [running.shown(slot_id)[1].held for slot_id in slots] == [3] * counters
        changed_seq = {running.shown(slot_id)[1].seq for slot_id in slots}
        assert max(changed_seq) == running.journal.head.seq


async def test_answers_without_events_wait_for_the_commit_in_flight(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client, other = await running.planned(base=1), await running.client()
        running.journal.hold()
        asked = await client.send(hold("a"))
        await running.until_appending(running.journal.appending + 1)
        looks = await other.send(commands.LookCounters([0]), commands.ShardStatus(), hold("a"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.silent()
        assert other.silent(), "they rest on a hold that may never have been"
        running.journal.free()
        (taken,) = await client.wait(asked)
        values, status, repeated = await other.wait(looks)
        assert isinstance(taken, outcomes.Taken)
        assert isinstance(values, outcomes.CounterValues)
        assert values.values[0][4] == 1
        assert isinstance(status, outcomes.Status)
        assert isinstance(repeated, outcomes.Record)
        assert (repeated.outcome, repeated.number) == (Outcome.REPEATED, taken.number)
        assert len(running.journal.rows) == running.worker.statistics().commits


async def test_commands_that_arrive_during_a_commit_share_the_next_row(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=100)
        clients = [await running.client() for _ in range(5)]
        running.journal.hold()
        first = await client.send(hold("first"))
        await running.until_appending(running.journal.appending + 1)
        asked = [await each.send(hold(f"{place}a"), hold(f"{place}b")) for place, each in enumerate(clients)]
        await trio.testing.wait_all_tasks_blocked(0.01)
        running.journal.free()
        replies = await client.wait(first)
        for each, request_ids in zip(clients, asked, strict=True):
            replies += await each.wait(request_ids)
        assert [row.count for row in running.journal.rows[-2:]] == [1, 10]
        numbers = [reply.number for reply in replies if isinstance(reply, outcomes.Taken)]
        assert len(set(numbers)) == 11
        statistics = running.worker.statistics()
        assert (statistics.commands, statistics.events) == (13, 14)


async def test_decisions_of_one_batch_see_each_other(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=3)
        replies = await client.wait(await client.send(*(hold(f"{place}") for place in range(5))))
        assert [type(reply) for reply in replies] == [outcomes.Taken] * 3 + [outcomes.Refused] * 2
        assert running.journal.rows[-1].count == 5
        assert running.shown()[1][5:9] == (3, 0, 0, 2), "held, confirmed, fulfilled, refused"


async def test_a_new_worker_shows_only_what_is_durable(tmp_path: Path) -> None:
    """The event that opens its term is not written yet when the first generation goes live."""
    disk = MemoryDisk()
    async with worker_in_memory(tmp_path, disk=disk) as running:
        await (await running.planned()).hold("a")
    journal = open_memory_journal(disk, epoch=1)
    publisher = Publisher(tmp_path, "starting", epoch=1, restart_count=journal.restart)
    recovered = working.recover(journal, tmp_path)
    worker = working.Worker(
        state=recovered.state,
        journal=journal,
        publisher=publisher,
        clock=ManualClock(),
        rules=ledger.Rules(),
        bounds=BOUNDS,
        directory=tmp_path,
        snapshot_seq=recovered.from_seq,
        shard=0,
        peers={},
    )
    worker.start_term(journal.epoch, journal.restart)
    worker.publish_all()
    reader = Reader(tmp_path, "starting")
    assert reader.position().seq == journal.head.seq == worker._ledger.seq - 1
    await worker.commit_first()
    assert reader.position().seq == journal.head.seq == worker._ledger.seq
    assert reader.row(0).held == 1
    reader.close()
    publisher.close()


# --- refusing before anything is done -----------------------------------------------------------------------------------


async def test_a_full_batch_refuses_at_once_and_does_nothing(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path, bounds=BOUNDS._replace(batch_commands_max=4)) as running:
        client = await running.planned(base=100)
        running.journal.hold()
        appends = running.journal.appending
        first = await client.send(hold("first"))
        await running.until_appending(appends + 1)
        asked = await client.send(*(hold(f"{place}") for place in range(7)), commands.ShardStatus())
        refused = await client.wait(asked[4:7])
        assert {outcome_of(reply) for reply in refused} == {Outcome.OVERLOADED}
        assert {reply.seq for reply in refused if isinstance(reply, outcomes.Refused)} == {running.journal.head.seq}
        assert client.silent(), "the others wait for the disk"
        running.journal.free()
        taken = await client.wait(first + asked[:4])
        assert {type(reply) for reply in taken} == {outcomes.Taken}
        assert isinstance((await client.wait(asked[7:]))[0], outcomes.Status)
        assert running.shown()[1].held == 5
        assert running.worker.statistics().overloaded == 3
        retried = await client.ask(hold("5"))
        assert isinstance(retried, outcomes.Taken), "nothing had been done under this key"


async def test_a_commit_that_takes_too_long_refuses_what_comes_but_not_the_planner(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=100)
        running.journal.hold()
        first = await client.send(hold("first"))
        await running.until_appending(running.journal.appending + 1)
        running.clock.boot_ms += BOUNDS.queue_ms_max
        in_time = await client.send(hold("in-time"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        running.clock.boot_ms += 1
        assert outcome_of(await client.hold("too-much")) is Outcome.OVERLOADED
        closing = await client.send(commands.PlanCounters(3, [counter_plan(EVENING, 1)]))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert client.silent()
        running.journal.free()
        assert {type(reply) for reply in await client.wait(first + in_time)} == {outcomes.Taken}
        assert isinstance((await client.wait(closing))[0], outcomes.Planned)
        assert (running.shown()[1].held, running.shown()[1].limit) == (2, 1)
        assert outcome_of(await client.hold("too-much")) is Outcome.INSUFFICIENT_CAPACITY


async def test_after_its_deadline_a_command_is_not_done(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        now_ms = running.clock.monotonic_ms()
        rows = len(running.journal.rows)
        assert outcome_of(await client.ask(hold("a"), now_ms - 1)) is Outcome.DEADLINE_PASSED
        assert len(running.journal.rows) == rows
        assert running.worker.statistics().too_late == 1
        assert isinstance(await client.ask(hold("a"), now_ms), outcomes.Taken)


async def test_on_a_disk_almost_full_only_new_units_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "HOUSEKEEPING_TICK_S", 0.002)
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        taken, confirmed = [await client.hold(name) for name in ("a", "b")]
        assert isinstance(taken, outcomes.Taken)
        assert isinstance(confirmed, outcomes.Taken)
        monkeypatch.setattr(working, "DISK_RESERVE_BYTES", 2**62)
        await until(lambda: running.worker._disk_low)
        head = running.journal.head
        assert outcome_of(await client.hold("c")) is Outcome.SHARD_FULL
        move = commands.Move(taken.number, 7, [van(1, NIGHT)])
        assert outcome_of(await client.ask(move)) is Outcome.SHARD_FULL
        assert outcome_of(await client.hold("a")) is Outcome.REPEATED, "what was taken before is told"
        assert running.journal.head == head
        assert outcome_of(await client.ask(commands.Confirm(confirmed.number, 8))) is Outcome.CONFIRMED
        assert outcome_of(await client.ask(commands.Release(taken.number, 9))) is Outcome.RELEASED
        running.clock.pass_ms(HOUR_MS)
        monkeypatch.setattr(working, "DISK_RESERVE_BYTES", 0)
        await until(lambda: not running.worker._disk_low)
        assert outcome_of(await client.hold("c")) is Outcome.HELD


# --- time ---------------------------------------------------------------------------------------------------------------


async def test_an_expiry_that_nobody_asked_for_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "EXPIRY_TICK_S", 0.002)
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        await client.hold("a", 2, ttl_ms=60_000)
        running.clock.pass_ms(59_999)
        # So many ticks that the next one would have been early, not late.
        asked = [await client.ask(commands.ShardStatus()) for _ in range(20)]
        assert len({reply.seq for reply in asked if isinstance(reply, outcomes.Status)}) == 1
        assert running.shown()[1].held == 2
        running.clock.pass_ms(1)
        await until(lambda: running.shown()[1].held == 0)
        (event,) = codec.decode_shard(running.journal.rows[-1])
        assert isinstance(event, events.Expired)
        assert running.shown()[0] == running.journal.head.seq


async def test_a_decision_frees_what_is_due_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "EXPIRY_TICK_S", 3600)
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=1)
        await client.hold("a", ttl_ms=60_000)
        assert outcome_of(await client.hold("b")) is Outcome.INSUFFICIENT_CAPACITY
        running.clock.pass_ms(60_000)
        assert outcome_of(await client.hold("b")) is Outcome.HELD


async def test_time_that_is_set_back_is_not_journaled(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        await client.hold("a")
        running.clock.wall_ms -= HOUR_MS
        assert outcome_of(await client.hold("b")) is Outcome.HELD
        assert running.journal.rows[-1].at_ms == running.journal.rows[-2].at_ms


async def test_finished_reservations_are_forgotten_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working, "HOUSEKEEPING_TICK_S", 0.002)
    rules = ledger.Rules(hold_ms_max=HOUR_MS, finished_keep_ms=HOUR_MS)
    async with worker_on_disk(tmp_path, rules=rules) as running:
        client = await running.planned()
        taken, kept = [await client.hold(name, ttl_ms=commands.NO_TTL) for name in ("gone", "kept")]
        assert isinstance(taken, outcomes.Taken)
        assert isinstance(kept, outcomes.Taken)
        await client.ask(commands.Release(taken.number, 5))
        running.clock.pass_ms(HOUR_MS)
        assert outcome_of(await client.hold("gone", ttl_ms=commands.NO_TTL)) is Outcome.REPEATED
        running.clock.pass_ms(1)
        await until(lambda: running.state.reservations.count == 1)
        assert outcome_of(await client.ask(commands.Look(taken.number))) is Outcome.UNKNOWN_RESERVATION
        assert outcome_of(await client.ask(commands.Look(kept.number))) is Outcome.FOUND
        assert outcome_of(await client.hold("gone", ttl_ms=commands.NO_TTL)) is Outcome.CONFIRMED, "the key is free"


# --- a mass expiry ------------------------------------------------------------------------------------------------------


def full(count: int, due_ms: int) -> ledger.Ledger:
    """Van stops of an evening, all of them held, all due in the same second."""
    state = ledger.Ledger()
    at_ms = due_ms - HOUR_MS
    for command in plan(count):
        _, made = ledger.decide(state, command, at_ms, ledger.Rules())
        for event in made:
            ledger.apply(state, event, at_ms)
    for place in range(count):
        digest = blake2b(b"%d" % place, digest_size=16).hexdigest()
        ledger.apply(state, events.Held([(0, 1)], due_ms + place % 1000, "", "", digest, 1), at_ms)
    return state


async def test_work_goes_on_while_very_many_holds_expire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decision is right while they do: what needs units waits for them, what concerns one hold sees it as expired."""
    monkeypatch.setattr(working, "EXPIRY_TICK_S", 3600)
    count = 100_000
    clock = ManualClock()
    state = full(count, clock.now_ms() + HOUR_MS)
    numbers = state.reservations.chunks()[-1].view("number").tolist()
    monkeypatch.setattr(working, "recover", lambda *_: working.Recovered(state, state.seq, 0, []))
    async with worker_in_memory(tmp_path, clock=clock) as running:
        client = await running.client()
        first_row = len(running.journal.rows)
        clock.pass_ms(HOUR_MS + 1_000)
        asked = await client.send(
            commands.Look(numbers[-1]),
            commands.Confirm(numbers[-2], 5),
            commands.Release(numbers[-3], 6),
            commands.Extend(numbers[-4], 7, HOUR_MS),
            hold("needs all", count - 1),
            hold("elsewhere", 1, slot_id=NIGHT),
        )
        *others, waited, elsewhere = await client.wait(asked[:4] + asked[4:])
        looked, confirmed, released, extended = others
        assert isinstance(looked, outcomes.Record)
        assert looked.status == EXPIRED
        assert isinstance(confirmed, outcomes.Record)
        assert (confirmed.outcome, confirmed.late) == (Outcome.CONFIRMED, True)
        assert outcome_of(released) is outcome_of(extended) is Outcome.HOLD_EXPIRED
        assert outcome_of(waited) is Outcome.HELD
        assert outcome_of(elsewhere) is Outcome.HELD
        assert isinstance(waited, outcomes.Taken)
        assert isinstance(elsewhere, outcomes.Taken)
        assert elsewhere.seq < waited.seq, "what needs no freed units does not wait for them"
        counters = running.state.counters
        assert (counters.held[0], counters.confirmed[0], counters.refused[0]) == (count - 1, 1, 0)
        made = [codec.decode_shard(row) for row in running.journal.rows[first_row:]]
    expired = [event for row in made for event in row if isinstance(event, events.Expired)]
    freed = [number for event in expired for number in event.numbers]
    assert len(freed) == len(set(freed)) == count, "each once"
    assert max(len(event.numbers) for event in expired) <= EXPIRED_IN_EVENT_MAX
    for row in made:
        large = [event for event in row if isinstance(event, events.Expired) and len(event.numbers) > 1]
        assert len(large) <= working.EXPIRY_STEPS_MAX


# --- stopping -----------------------------------------------------------------------------------------------------------


async def test_stop_commits_and_answers_what_was_taken_and_takes_no_more(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=100)
        running.journal.hold()
        first = await client.send(hold("first"))
        await running.until_appending(running.journal.appending + 1)
        second = await client.send(hold("second"), commands.ShardStatus())
        await trio.testing.wait_all_tasks_blocked(0.01)
        running.worker.stop()
        assert outcome_of(await client.hold("after")) is Outcome.OVERLOADED
        assert not running.ended.is_set()
        running.journal.free()
        replies = await client.wait(first + second)
        assert [type(reply) for reply in replies] == [outcomes.Taken, outcomes.Taken, outcomes.Status]
        with trio.fail_after(PATIENCE_SECONDS):
            await running.ended.wait()
        assert fingerprint(replayed(running.journal.read(GENESIS))) == fingerprint(running.state)


async def test_a_worker_under_load_stops(tmp_path: Path) -> None:
    """Each answer finds the next question asked already, so that there is always something in the open batch."""
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=1_000)

        async def keep_asking(caller: Client, name: str) -> None:
            asked = await caller.send(hold(name))
            for place in itertools.count():
                following = await caller.send(hold(f"{name}{place}"))
                (reply,) = await caller.wait(asked)
                if outcome_of(reply) is Outcome.OVERLOADED:
                    return
                asked = following

        async with trio.open_nursery() as nursery:
            for name in "abcd":
                nursery.start_soon(keep_asking, await running.client(), name)
            await until(lambda: running.worker.statistics().events > 50)
            running.worker.stop()
            with trio.fail_after(PATIENCE_SECONDS):
                await running.ended.wait()
            nursery.cancel_scope.cancel()
        assert client.silent()


# --- peers --------------------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_read_is_cut_off_and_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "OUTBOX_BYTES_MAX", 1_000_000)
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned(base=100)
        deaf = await running.client()
        wanted = commands.LookCounters([0, 1] * 1_000)
        cut_off = trio.Event()

        async def ask_on() -> None:
            try:
                while True:
                    await deaf.send(wanted)
            except (BrokenPipeError, ConnectionResetError):
                cut_off.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_on)
            place = 0
            with trio.fail_after(PATIENCE_SECONDS):
                while not cut_off.is_set():
                    place += 1
                    reply = await client.hold(f"{place}")
                    assert isinstance(reply, outcomes.Taken | outcomes.Refused)
        assert outcome_of(await client.hold("1")) is Outcome.REPEATED
        assert not running.ended.is_set()


async def test_a_client_that_leaves_with_answers_unread_harms_nobody(tmp_path: Path) -> None:
    async with worker_on_disk(tmp_path) as running:
        client = await running.planned()
        leaving = await running.client()
        for _ in range(20):
            await leaving.send(commands.LookCounters([0, 1] * 2_000))
        await client.ask(commands.ShardStatus())
        leaving.close()
        assert outcome_of(await client.hold("a")) is Outcome.HELD
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert outcome_of(await client.hold("b")) is Outcome.HELD


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        (5).to_bytes(4, "big") + b"\xc1\xc1\xc1\xc1\xc1",
        wire.frame([(1, 2)]),
        wire.frame([("1", FOREVER_MS, commands.ShardStatus())]),
        wire.frame([(1, FOREVER_MS, commands.PlannerStatus())]),
        wire.frame({"a": 1}),
    ],
    ids=["http", "too long", "no msgpack", "no tuple", "no id", "for the planner", "no list"],
)
async def test_garbage_cuts_off_only_who_sent_it(tmp_path: Path, garbage: bytes) -> None:
    async with worker_in_memory(tmp_path) as running:
        client, bad = await running.planned(), await running.client()
        taken = await bad.send(hold("before"))
        await bad.send_bytes(garbage)
        await bad.until_cut_off()
        assert outcome_of(await client.hold("after")) is Outcome.HELD
        assert running.shown()[1].held == 2, "what came before the garbage was done"
        assert taken == [0]


async def test_half_a_frame_does_nothing(tmp_path: Path) -> None:
    async with worker_in_memory(tmp_path) as running:
        client, half = await running.planned(), await running.client()
        frame = wire.frame([(0, FOREVER_MS, hold("half"))])
        await half.send_bytes(frame[:-1])
        half.close()
        await client.ask(commands.ShardStatus())
        assert running.shown()[1].held == 0


async def test_too_many_connections_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CONNECTIONS_MAX", 3)
    async with worker_in_memory(tmp_path) as running:
        client = await running.planned()
        await (await running.client()).ask(commands.ShardStatus())
        leaving = await running.client()
        await leaving.ask(commands.ShardStatus())
        await (await running.client()).until_cut_off()
        leaving.close()
        await client.ask(commands.ShardStatus())

        async def is_served() -> bool:
            try:
                await (await running.client()).ask(commands.ShardStatus())
            except ConnectionResetError:
                return False
            return True

        with trio.fail_after(PATIENCE_SECONDS):
            while not await is_served():
                pass


# --- ending -------------------------------------------------------------------------------------------------------------

_DYING = """
import sys, trio
from pathlib import Path
from engine import worker
from engine.core import commands
from engine.ports import JournalWriteError
from tests.engine.engine_tools import FOREVER_MS, hold, worker_in_memory
from engine import wire

async def main(how, directory):
    async with worker_in_memory(Path(directory)) as running:
        client = await running.planned()
        if how == "write":
            async def fail(**row):
                raise JournalWriteError("the disk says no")
            running.journal.journal.append = fail
            asked = hold("a")
        else:
            asked = commands.PlanCounters(9, [worker_plan])
        print("asking", flush=True)
        reply = await client.ask(asked)
        print("answered", reply, flush=True)

from tests.engine.engine_tools import counter_plan
worker_plan = counter_plan("2026-12-01T18:00-20:00", 1, pool_code=77)
trio.run(main, *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("how", "words"), [("write", "the outcome of a write is unknown"), ("invariant", "a pool must reach a shard")]
)
def test_a_failed_append_or_a_broken_invariant_kills_without_an_answer(tmp_path: Path, how: str, words: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _DYING, how, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == -9
    assert ended.stdout == "asking\n"
    assert words in ended.stderr


# --- cut after each step ------------------------------------------------------------------------------------------------


class CrashingJournal(HeldJournal):
    """A `MemoryJournal` whose process ends inside its append number `cut`."""

    def __init__(self, disk: MemoryDisk, cut: int) -> None:
        self.memory = open_memory_journal(disk, epoch=1)
        super().__init__(self.memory)
        self.cut = cut
        self.crashed = trio.Event()

    async def append(self, *, count: int, at_ms: int, schema: int, body: bytes) -> JournalRow:
        if self.appending + 1 == self.cut:
            self.memory.stage(count=count, at_ms=at_ms, schema=schema, body=body)
            self.crashed.set()
            await trio.sleep_forever()
        return await super().append(count=count, at_ms=at_ms, schema=schema, body=body)


KEYS = [key(name) for name in ("a", "b", "c", "big", "d", "e", "f", "never")]

Step = Callable[[list[int]], commands.Command]
"""A command made from the numbers of the reservations so far."""

STORY: list[tuple[int, Step]] = [
    # ms that pass before, command
    *[(0, (lambda made, command=command: command)) for command in plan(base=3)],
    (10, lambda made: hold("a", ttl_ms=600_000)),
    (10, lambda made: hold("b", 2, ttl_ms=5_000)),
    (10, lambda made: hold("c")),  # refused: full
    (10, lambda made: commands.Confirm(made[0], 101)),
    (6_000, lambda made: hold("c", ttl_ms=commands.NO_TTL)),  # b has expired
    (10, lambda made: hold("big", 40, slot_id=NIGHT)),
    (10, lambda made: commands.Move(made[3], 102, [van(7, NIGHT)])),
    (10, lambda made: commands.PlanCounters(3, [counter_plan(EVENING, 6)])),
    (10, lambda made: commands.Confirm(made[1], 103)),  # late, and there is room again
    (10, lambda made: commands.Extend(made[3], 104, 900_000)),
    (10, lambda made: commands.Release(made[0], 105)),
    (10, lambda made: hold("d", 9)),  # refused
    (10, lambda made: commands.Fulfil(made[2], 106)),
    (10, lambda made: hold("e", ttl_ms=1_000)),
    (2_000, lambda made: hold("f")),  # e has expired
    (10, lambda made: commands.PlanPool(4, 0, "van-north", "Europe/Berlin", (90, None, None))),
]


class Told:
    """What a client of the story knows: the numbers it was given and every answer."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.outcomes: list[str] = []
        self.seq = 0

    def take(self, reply: outcomes.Reply) -> None:
        repeated = isinstance(reply, outcomes.Record) and reply.outcome is Outcome.REPEATED
        if isinstance(reply, outcomes.Taken | outcomes.Record) and (repeated or isinstance(reply, outcomes.Taken)):
            self.numbers.append(reply.number)
        self.outcomes.append(
            type(reply).__name__ if isinstance(reply, outcomes.Planned | outcomes.Taken) else outcome_of(reply).value
        )
        self.seq = max(self.seq, reply.seq)  # type: ignore[attr-defined]  # every reply has one


async def tell(running: Running, told: Told, *, steps: int = len(STORY)) -> None:
    """Ask step by step from where the caller had got to."""
    client = await running.client()
    for after_ms, step in STORY[len(told.outcomes) : steps]:
        running.clock.pass_ms(after_ms)
        told.take(await client.ask(step(told.numbers)))
        await until(lambda: not running.worker._snapshot_running)


def essence(state: ledger.Ledger) -> dict[str, object]:
    """What must be the same whatever crashed in between: units, records by key, refused demand."""
    counters = state.counters
    found: dict[str, object] = {
        name: getattr(counters, name).tolist()
        for name in ("base", "limit", "held", "confirmed", "fulfilled", "refused", "cutoff_at_ms", "plan_version")
    }
    for each in KEYS:
        record = ledger.find_key(state, each)
        if record is not None:
            chunk, row = record
            found[each.decode()] = (chunk.status[row], state.reservations.lines(chunk, row), chunk.version[row])
    found["refused_keys"] = list(state.refused_keys)
    found["planning_seq"] = state.planning_seq
    return found


def check_recovery(disk: MemoryDisk, directory: Path) -> ledger.Ledger:
    """Recover with and without snapshots: the same state, in every respect that can be asked for."""
    journal = open_memory_journal(disk, epoch=1)
    recovered = working.recover(journal, directory)
    assert recovered.warnings == []
    assert recovered.from_seq + recovered.events_replayed == recovered.state.seq == journal.head.seq
    whole = replayed(disk.rows)
    assert fingerprint(recovered.state, KEYS) == fingerprint(whole, KEYS)
    journal.crash()
    return recovered.state


async def story_uncut(tmp_path: Path, bounds: Bounds) -> tuple[Told, dict[str, object], int]:
    told = Told()
    async with worker_in_memory(tmp_path, bounds=bounds) as running:
        await tell(running, told)
        return told, essence(running.state), running.journal.appending


@pytest.mark.parametrize("kept", [0, 1], ids=["the row is lost", "the row is there"])
async def test_cut_in_each_commit_and_expect_the_rest(
    tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies in each of its commits; its successor knows what was told, and the story comes to the same end."""
    monkeypatch.setattr(working, "EXPIRY_TICK_S", 3600)  # only commands free holds, so that both tellings are alike
    (tmp_path / "uncut").mkdir()
    bounds = BOUNDS._replace(snapshot_every_events=4)
    expected, end, commits = await story_uncut(tmp_path / "uncut", bounds)
    assert commits == 1 + len(STORY), "a commit for the term and for each step"
    snapshots_used = 0
    for cut in range(2, commits + 1):
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        disk, told, clock = MemoryDisk(), Told(), ManualClock()
        crashing = CrashingJournal(disk, cut)
        async with (
            running_worker(crashing, directory, bounds=bounds, clock=clock) as running,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(tell, running, told)
            with trio.fail_after(PATIENCE_SECONDS):
                await crashing.crashed.wait()
            nursery.cancel_scope.cancel()
        acknowledged = disk.rows_synced
        crashing.memory.crash(staged_rows_kept=kept)
        assert len(disk.rows) == acknowledged + kept
        state = check_recovery(disk, directory)
        assert told.seq <= disk.rows[acknowledged - 1].end.seq <= state.seq, "what was answered is there"
        snapshots_used += bool(newest_first(directory))
        clock.wall_ms -= STORY[len(told.outcomes)][0]  # the lost step comes again, at its time
        async with worker_in_memory(directory, disk=disk, bounds=bounds, clock=clock) as running:
            await tell(running, told)
            assert essence(running.state) == end
            again = await running.client()
            for name in ("a", "big", "f"):
                assert outcome_of(await again.ask(retry(name))) is Outcome.REPEATED
            assert outcome_of(await again.ask(hold("d", 9))) is Outcome.INSUFFICIENT_CAPACITY
            assert essence(running.state) == end, "a refused retry is not counted twice"
        differing = [
            (before, now) for before, now in zip(expected.outcomes, told.outcomes, strict=True) if before != now
        ]
        assert differing in ([], [("Taken", "repeated")]), differing
    assert snapshots_used > len(STORY) / 2


def retry(name: str) -> commands.Hold:
    """The very request of the story again."""
    (found,) = [
        command for _, step in STORY if isinstance(command := step([0] * 9), commands.Hold) and command.key == key(name)
    ]
    return found


async def test_every_state_of_a_real_directory_recovers_to_what_was_answered(tmp_path: Path) -> None:
    """The files as a kill would leave them after each answer, snapshots among them."""
    directory = tmp_path / "shard-00"
    directory.mkdir()
    told, images = Told(), []
    async with worker_on_disk(directory, bounds=BOUNDS._replace(snapshot_every_events=3)) as running:
        for steps in range(1, len(STORY) + 1):
            await tell(running, told, steps=steps)
            image = tmp_path / f"image-{steps}" / "shard-00"
            shutil.copytree(directory, image, ignore=shutil.ignore_patterns("lock", "*.sock", "*.rm"))
            images.append((image, fingerprint(running.state, KEYS)))
        assert running.worker.statistics().snapshots >= 5
    from_snapshots = set()
    for image, expected in images:
        async with await open_journal(image, epoch=2) as journal:
            recovered = working.recover(journal, image)
            assert fingerprint(recovered.state, KEYS) == expected
            assert fingerprint(replayed(journal.read(GENESIS)), KEYS) == expected
            assert recovered.warnings == []
            from_snapshots.add(recovered.from_seq)
    assert len(from_snapshots) >= 5


async def test_after_a_restart_holds_expire_keys_repeat_and_refusals_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "EXPIRY_TICK_S", 0.002)
    clock = ManualClock()
    bounds = BOUNDS._replace(snapshot_every_events=4)
    async with worker_on_disk(tmp_path, bounds=bounds, clock=clock) as running:
        client = await running.planned()
        taken = await client.hold("a", 3, ttl_ms=60_000)
        assert isinstance(taken, outcomes.Taken)
        assert outcome_of(await client.hold("b")) is Outcome.INSUFFICIENT_CAPACITY
        await until(lambda: running.worker.statistics().snapshots == 1)
    for restart in range(1, 4):
        async with worker_on_disk(tmp_path, bounds=bounds, clock=clock) as running:
            client = await running.client()
            again = await client.hold("a", 3, ttl_ms=60_000)
            assert isinstance(again, outcomes.Record)
            assert (again.outcome, again.number, again.expires_at_ms) == (
                Outcome.REPEATED,
                taken.number,
                taken.expires_at_ms,
            )
            assert outcome_of(await client.hold("b")) is Outcome.INSUFFICIENT_CAPACITY
            assert running.shown()[1].refused == 1
            assert (running.state.epoch, running.state.restart) == (1, restart)
            if restart == 3:
                clock.pass_ms(60_000)
                await until(lambda: running.shown()[1].held == 0)


async def test_short_terms_do_not_keep_snapshots_from_being_taken(tmp_path: Path) -> None:
    """What has to be replayed counts, not what this worker has done; and nobody waits for it before being served."""
    bounds = BOUNDS._replace(snapshot_every_events=10)
    events_replayed = []
    for restart in range(12):
        async with worker_on_disk(tmp_path, bounds=bounds) as running:
            assert running.worker.statistics().snapshots == 0
            client = await running.client()
            if restart == 0:
                client = await running.planned(base=100)
            for place in range(3):
                await client.hold(f"{restart} {place}")
            await until(lambda: not running.worker._snapshot_running)
        async with await open_journal(tmp_path, epoch=1) as journal:
            events_replayed.append(working.recover(journal, tmp_path).events_replayed)
    assert max(events_replayed) < 10 + 4
    assert len(newest_first(tmp_path)) == 2
