"""The judge: it sees requests, replies and the final journals, and nothing of the memory of a shard.

- every answer that names a version of a reservation is what the home's journal says that version was (b);
- one key makes at most one reservation, all answers to a key name it, a key that was refused for good makes none (c, d);
- every change in a journal was asked for or is an expiry; what was refused for good never appears (d, e);
- over all shards: nothing pinned, nothing owed, every part as at home (`engine.cross_audit`), units are the sum of lines (a,
  e).
"""

from typing import NamedTuple

from engine import codec
from engine.core import commands, events, outcomes
from engine.core.columns import CONFIRMED, EXPIRED, FULFILLED, HELD, RELEASED
from engine.core.outcomes import Outcome
from engine.core.sharding import counter_hash, reservation_number
from engine.cross_audit import cross_audit
from tests.sim.clients import TRY_AGAIN, Ask
from tests.sim.world import POOL, Node, Violation, World

DONE = (Outcome.CONFIRMED, Outcome.RELEASED, Outcome.EXTENDED, Outcome.MOVED, Outcome.FULFILLED)


class Version(NamedTuple):
    """A reservation after one of its events."""

    status: int
    lines: dict[str, int]
    action: int
    expires_at_ms: int


class Story(NamedTuple):
    """A reservation by its home's journal."""

    key: bytes
    versions: list[Version]


def stories(node: Node) -> dict[int, Story]:
    """Every reservation at home on a shard, told from its journal alone."""
    found: dict[int, Story] = {}
    names: list[str] = []
    seq = 0

    def own(lines: list[events.CounterUnits]) -> dict[str, int]:
        return {names[row]: units for row, units in lines}

    def elsewhere(parts: list[events.PartUnits] | None) -> dict[str, int]:
        return {slot_id: units for _, _, lines in parts or [] for _, slot_id, units in lines}

    def here(lines: dict[str, int]) -> dict[str, int]:
        return {name: units for name, units in lines.items() if name in names}

    def go_on(number: int, action: int, status: int | None = None, **changes: object) -> None:
        last = found[number].versions[-1]
        status = last.status if status is None else status
        found[number].versions.append(last._replace(action=action, status=status)._replace(**changes))  # type: ignore[arg-type]  # by the callers below

    for row in node.rows:
        for event in codec.decode_shard(row):
            seq += 1
            match event:
                case events.CountersDefined():
                    names += [plan[1] for plan in event.counters if plan[1] not in names]
                case events.Held() | events.ConfirmedAtOnce():
                    is_held = isinstance(event, events.Held)
                    lines = own(event.lines) | elsewhere(event.parts)
                    expires_at_ms = event.expires_at_ms if isinstance(event, events.Held) else 0
                    first = Version(HELD if is_held else CONFIRMED, lines, 0, expires_at_ms)
                    number = reservation_number(seq, counter_hash(POOL, names[event.lines[0][0]]))
                    found[number] = Story(bytes.fromhex(event.key), [first])
                case events.Confirmed():
                    lines = found[event.number].versions[-1].lines
                    kept = here(lines) if event.kept is None else own(event.kept)
                    rest = {name: units for name, units in lines.items() if name not in names}
                    rest = rest if event.parts is None else elsewhere(event.parts)
                    go_on(event.number, event.action, CONFIRMED, lines=kept | rest)
                case events.Moved():
                    lines = found[event.number].versions[-1].lines
                    rest = {name: units for name, units in lines.items() if name not in names}
                    rest = rest if event.parts is None else elsewhere(event.parts)
                    go_on(event.number, event.action, lines=own(event.lines) | rest)
                case events.Released():
                    go_on(event.number, event.action, RELEASED)
                case events.Extended():
                    go_on(event.number, event.action, expires_at_ms=event.expires_at_ms)
                case events.Fulfilled():
                    go_on(event.number, event.action, FULFILLED)
                case events.Expired():
                    for number in event.numbers:
                        if number in found:
                            go_on(number, 0, EXPIRED)
                case _:
                    pass
    return found


def require(condition: bool, text: str) -> None:
    """Raise Violation unless `condition`."""
    if not condition:
        raise Violation(text)


def check(world: World, asks: list[Ask]) -> None:
    """Hold what was answered against what is journaled. Raises Violation."""
    told = [stories(node) for node in world.nodes]
    everything = {number: story for each in told for number, story in each.items()}
    of_key: dict[bytes, list[int]] = {}
    for number, story in everything.items():
        of_key.setdefault(story.key, []).append(number)
    for key, numbers in of_key.items():
        require(len(numbers) == 1, f"key {key.hex()} made {numbers}")
    keys, actions, refused = set(), {0}, set()
    for ask in asks:
        if isinstance(ask.command, commands.Hold):
            keys.add(ask.command.key)
        elif not isinstance(ask.command, commands.Look):
            actions.add(ask.command.action)  # type: ignore[union-attr]  # customers send only these
        for reply in ask.replies:
            _check_reply(ask, reply, everything, of_key)
        last = ask.replies[-1] if ask.replies else None
        if isinstance(last, outcomes.Refused) and last.outcome not in TRY_AGAIN:
            refused.add(ask.command.key if isinstance(ask.command, commands.Hold) else ask.command.action)  # type: ignore[union-attr]  # as above
    for number, story in everything.items():
        require(story.key in keys, f"{number} was never asked for")
        require(story.key not in refused, f"{number} was refused and is there")
        for place, version in enumerate(story.versions):
            require(version.action in actions, f"nobody asked for {version.action} on {number}")
            # A record remembers its last action only: after somebody else's step a second try is decided anew.
            is_last = all(later.action in (0, version.action) for later in story.versions[place:])
            require(
                version.action not in refused or not is_last, f"{version.action} on {number} was refused and happened"
            )
    report = cross_audit([node.auditor for node in world.nodes])
    require(not report.problems, f"{report.problems}")
    require(
        (report.owed, report.pinned, report.moving) == (0, 0, 0), f"still in flight after everything healed: {report}"
    )
    expected: dict[str, int] = dict.fromkeys(world.slots, 0)
    for story in everything.values():
        last_version = story.versions[-1]
        require(last_version.status != HELD, f"a hold outlived its time: {story}")
        if last_version.status in (CONFIRMED, FULFILLED):
            for name, units in last_version.lines.items():
                expected[name] += units
    for node in world.nodes:
        node.auditor.recount()
        require(not node.auditor.findings, f"{node.auditor.findings[:1]}")
        for total in node.auditor.totals():
            used = total.held + total.confirmed + total.fulfilled
            require(
                used == expected[total.slot_id],
                f"{used} units of {total.slot_id} are taken, its reservations have {expected[total.slot_id]}",
            )


def _check_reply(ask: Ask, reply: outcomes.Reply, everything: dict[int, Story], of_key: dict[bytes, list[int]]) -> None:
    command = ask.command
    if isinstance(reply, outcomes.Taken):
        require(isinstance(command, commands.Hold), f"{reply} to {command}")
        story = everything.get(reply.number)
        require(story is not None, f"{reply} was acknowledged and is lost")
        if story is not None and isinstance(command, commands.Hold):
            lines: dict[str, int] = {}
            for line in command.lines:
                lines[line.slot_id] = lines.get(line.slot_id, 0) + line.quantity
            first = story.versions[0]
            require(story.key == command.key, f"{reply} to another key")
            require((first.lines, first.expires_at_ms) == (lines, reply.expires_at_ms), f"{reply} but {first}")
    elif isinstance(reply, outcomes.Record):
        story = everything.get(reply.number)
        require(story is not None and len(story.versions) >= reply.version, f"{reply} was acknowledged and is lost")
        if story is not None:
            version = story.versions[reply.version - 1]
            lines = {slot_id: units for _, slot_id, units in reply.lines}
            shown = (reply.status, lines, reply.expires_at_ms)
            require(shown == (version.status, version.lines, version.expires_at_ms), f"{reply} but {version}")
            if reply.outcome in DONE and not isinstance(command, commands.Hold | commands.Look):
                require(version.action == command.action, f"{reply} was done by {version.action}")  # type: ignore[union-attr]  # steps have one
    if isinstance(command, commands.Hold) and isinstance(reply, outcomes.Taken | outcomes.Record):
        require(of_key.get(command.key) == [reply.number], f"{reply}, but the key made {of_key.get(command.key)}")
