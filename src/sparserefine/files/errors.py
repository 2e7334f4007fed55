"""What exceptions of other libraries say, shortened for our messages."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
