"""What must hold, checked in production too.

A broken invariant means that memory no longer says what the journal says. The only safe step is to stop before anything
is written or answered: `InvariantError` derives from BaseException so that no `except Exception` on the way can swallow
it, and the process shell that meets it kills the process. `assert` is not used for this: `python -O` removes it.
"""


class InvariantError(BaseException):  # noqa: N818 - it is an error; BaseException on purpose, see above
    """A promise of the code to itself is broken. Never caught, except to end the process."""


def invariant(condition: bool, text: str) -> None:  # noqa: FBT001 - reads like a sentence at every call
    """Raise `InvariantError` with `text` unless `condition` holds."""
    if not condition:
        raise InvariantError(text)
