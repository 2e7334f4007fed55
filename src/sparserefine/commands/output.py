"""What the command line prints: any name on any terminal, control characters escaped, quiet when nobody reads."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from sparserefine.files.text import printable

_LONGEST = 4000
"""Most characters of a line of an error."""


@contextmanager
def escaped_output() -> Iterator[None]:
    r"""While the block runs, logs and warnings are printed with control characters escaped; then flushes the output.

    Standard output and errors never fail at a character that they have no bytes for: it is printed as ``\u1234``.

    Raises:
        BrokenPipeError: whoever read the output has gone, as ``head`` does.
        OSError: the output cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(_Escaped())
    ours, before = logging.getLogger("sparserefine"), (logging.lastResort, warnings.formatwarning)
    logging.lastResort, warnings.formatwarning = handler, _warning  # of libraries that set up no output of their own
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        logging.lastResort, warnings.formatwarning = before
        if sys.stdout is not None:
            sys.stdout.flush()


def print_error(text: str) -> None:
    """Prints text to standard error, each of its lines escaped and of a length that can be read."""
    print("\n".join(_shortened(printable(line)) for line in text.split("\n")), file=sys.stderr)


def _shortened(line: str) -> str:
    """The beginning says what is wrong, the end says the cure; values between them may have any length."""
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... ({len(line)} characters) ... {line[-_LONGEST // 4 :]}"


def discard_output() -> None:
    """Lets what cannot be written go, so that Python does not try again when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Escaped(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{printable(filename)}:{lineno}: {category.__name__}: {printable(message)}\n"
