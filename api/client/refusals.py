"""Reading a problem document (RFC 9457), and making the exception that it stands for.

Rules
- As much is read as can be: a document whose lines are of another shape still has its words, and what is no document at
  all still has its status.

Not promised: members that the client does not act on.
"""

from contextlib import suppress

import msgspec

from api.client.answers import Alternative, CounterShort, Reservation
from api.client.errors import CLASS_OF_CODE, Refused, SlotkeeperError
from api.client.exchange import Answered


class Problem(msgspec.Struct, frozen=True):
    """RFC 9457, as far as the client acts on it."""

    code: str = ""
    outcome: str = ""
    title: str = ""
    detail: str = ""
    lines: tuple[CounterShort, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    reservation: Reservation | None = None
    position: str | None = None


class _ProblemWords(msgspec.Struct, frozen=True):
    """The same of a server whose lines or reservations are of another shape."""

    code: str = ""
    outcome: str = ""
    title: str = ""
    detail: str = ""


_problem = msgspec.json.Decoder(Problem)
_problem_words = msgspec.json.Decoder(_ProblemWords)


def problem_of(body: bytes) -> Problem:
    """A problem document, as far as it can be read."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _problem.decode(body)
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        words = _problem_words.decode(body)
        return Problem(words.code, words.outcome, words.title, words.detail)
    return Problem()


def refused(
    problem: Problem, answer: Answered, key: str | None, tries: int, *, maybe_executed: bool
) -> SlotkeeperError:
    kind = CLASS_OF_CODE.get(problem.code, Refused)
    return (kind if issubclass(kind, Refused) else Refused)(
        problem.detail or problem.title or f"answered {answer.status}",
        code=problem.code or f"http_{answer.status}",
        key=key,
        tries=tries,
        maybe_executed=maybe_executed,
        status=answer.status,
        lines=problem.lines,
        alternatives=problem.alternatives,
        reservation=problem.reservation,
        position=problem.position,
        retry_after_seconds=answer.retry_after_seconds,
    )
