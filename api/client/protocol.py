"""All tries of a call: what to do next, and how it ended. Pure; both faces obey it and decide nothing.

Rules
- `NotExecuted` means that no try can have been executed. Otherwise it is `OutcomeUnknown`, also where the last try was refused
  for want of a shard: an earlier one may have been executed. Reading changes nothing and is never unknown.
- A refusal (4xx) is never retried. One that follows a try whose outcome is unknown says so: `maybe_executed`.
- Retries wait: full jitter below a doubling ceiling, after what Retry-After says, within the deadline of the call and the
  retry budget of the process. One kind does not wait: a kept connection that was closed before any byte of an answer was
  most likely closed while idle, and one more try over a fresh connection costs nobody anything.
- What carries If-Match is not repeated once it may have been executed: a second try would meet the first one's change. It
  goes over a fresh connection, so that a connection gone stale cannot make its outcome unknown.
- Time and chance are arguments.

Not promised: that a try that was lost does not arrive after the call has ended (its key keeps it from counting twice).
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import msgspec

from api.client.budget import RetryBudget
from api.client.calls import Call, T_co
from api.client.errors import NotExecuted, OutcomeUnknown, SlotkeeperError
from api.client.exchange import Address, Answered, Ending, Lost, NotConnected, NotUnderstood, request_bytes
from api.client.refusals import problem_of, refused
from api.client.settings import Settings
from engine.core.invariant import invariant

PAUSE_SECONDS_MIN = 0.05
PAUSE_SECONDS_MAX = 2.0
"""The ceiling of the first pause, and of all. A worker is back in about half a second: the fourth pause has passed it."""

invariant(PAUSE_SECONDS_MIN < PAUSE_SECONDS_MAX, "pauses grow")


@dataclass(frozen=True, slots=True)
class Try:
    """Send the request and wait for its answer."""

    request: bytes
    fresh: bool
    """Over a connection that has not been used."""
    until: float
    """The deadline of the call, by its clock."""
    answer_seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait."""

    seconds: float


_Insisting = Generator[Try | Pause, Ending | None, T_co]


def pause_seconds(retry: int, retry_after_seconds: float | None, chance: Callable[[], float]) -> float:
    """How long to wait before a retry (the first is 0): after what the server said, anything below a doubling ceiling."""
    ceiling_seconds = min(PAUSE_SECONDS_MAX, PAUSE_SECONDS_MIN * float(1 << min(retry, 30)))
    return (retry_after_seconds or 0.0) + chance() * ceiling_seconds


def insist(
    call: Call[T_co],
    settings: Settings,
    address: Address,
    budget: RetryBudget,
    now: Callable[[], float],
    chance: Callable[[], float],
    count: Callable[[str], None],
) -> _Insisting[T_co]:
    """Try until there is an answer, a refusal, or no time or budget left. Returns the answer; raises SlotkeeperError."""
    deadline_seconds = call.deadline_seconds or settings.deadline_seconds
    answer_seconds = call.deadline_seconds or settings.answer_seconds
    request = request_bytes(call, settings, address)
    until = now() + deadline_seconds
    maybe_executed = False
    fresh = not call.is_repeatable
    tries = retries = 0
    budget.count_call()
    count("calls")

    def gave_up(why: str, last: str, code: str = "") -> SlotkeeperError:
        kind = OutcomeUnknown if maybe_executed else NotExecuted
        text = (
            f"{call.method} {call.target}: {why} after {tries} {'try' if tries == 1 else 'tries'}; the last one: {last}"
        )
        return kind(text, code=code, key=call.key, tries=tries, maybe_executed=maybe_executed)

    while True:
        tries += 1
        count("tries")
        ending = yield Try(request, fresh, until, answer_seconds)
        code, may_now = "", False
        retry_after_seconds: float | None = None
        match ending:
            case Answered(status, body) if 200 <= status < 300:
                try:
                    return call.decode(body)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    maybe_executed = call.changes
                    raise gave_up("gave up", f"its answer {status} is not of the shape expected: {error}") from error
            case Answered(status, body):
                retry_after_seconds = ending.retry_after_seconds
                problem = problem_of(body)
                code = problem.code
                may_now = problem.outcome != "not_executed"
                if status != 503 and (status < 500 or not may_now):
                    raise refused(problem, ending, call.key, tries, maybe_executed=maybe_executed)
                last = f"answered {status} {code} {problem.detail or problem.title}".rstrip()
            case NotConnected(last):
                pass
            case Lost(last, is_sent, is_stale):
                may_now = is_sent
                if is_stale:
                    # At most once, since a fresh connection is never stale; and only what is repeatable meets a kept one.
                    maybe_executed = maybe_executed or (may_now and call.changes)
                    fresh = True
                    count("stale")
                    continue
            case NotUnderstood(last):
                maybe_executed = call.changes
                raise gave_up("gave up", last)
            case None:
                raise TypeError("a try has an ending")
        maybe_executed = maybe_executed or (may_now and call.changes)
        if may_now and not call.is_repeatable:
            raise gave_up("not repeated, because of its If-Match,", last, code)
        seconds = pause_seconds(retries, retry_after_seconds, chance)
        if now() + seconds >= until:
            raise gave_up(f"no answer within {deadline_seconds:g} s", last, code)
        if not budget.take():
            count("budget_spent")
            raise gave_up("the retry budget is spent", last, code)
        retries += 1
        count("retries")
        yield Pause(seconds)
