"""What must hold, checked in production too.

A broken invariant means that memory no longer says what the journal says. The only safe step is to stop before anything
is written or answered: `InvariantError` derives from BaseException so that no `except Exception` on the way can swallow
it, and the process shell that meets it kills the process. `assert` is not used for this: `python -O` removes it.
"""

from typing import NoReturn


class InvariantError(BaseException):
    """A promise of the code to itself is broken. Never caught, except to end the process."""


def invariant(condition: bool, text: str) -> None:
    """Raise `InvariantError` with `text` unless `condition` holds."""
    if not condition:
        raise InvariantError(text)


def broken(text: str) -> NoReturn:
    """Raise `InvariantError`: this place must not be reached."""
    raise InvariantError(text)
