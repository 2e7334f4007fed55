"""Text from files, names and other libraries, made safe and short for messages."""

from __future__ import annotations

import unicodedata


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if there is no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: object) -> str:
    r"""Text on one line, with control characters escaped.

    File names, class names and values of configurations may contain anything: a line feed fakes lines of output, an
    escape sequence changes a terminal.

    >>> print(printable("a\x1b[31m\n.png"))
    a\x1b[31m\n.png
    """
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in str(text))
