"""Text that goes into the head of a request as it is.

Rules
- Visible ASCII only: no space and no line end, so that no text can become a second header line.

Not promised: that the server understands it; only that it arrives as one value.
"""

import re

VISIBLE = re.compile(r"[\x21-\x7e]+")


def checked(name: str, text: str | None, chars_max: int) -> str | None:
    """A text that goes into a header line as it is. Raises ValueError."""
    if text is not None and not (VISIBLE.fullmatch(text) and len(text) <= chars_max):
        raise ValueError(f"{name} must have 1 to {chars_max} visible ASCII characters, not {text!r}")
    return text
