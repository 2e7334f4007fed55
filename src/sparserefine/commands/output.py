"""What the command line prints: any name on any terminal, control characters escaped, quiet when nobody reads."""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparserefine.files.text import printable

_LONGEST = 4000
"""Most characters of a line of an error."""


@contextmanager
def escaped_output(*, tracebacks: bool = False) -> Iterator[None]:
    r"""While the block runs, logs and warnings are printed with control characters escaped; then flushes the output.

    Standard output and errors never fail at a character that they have no bytes for: it is printed as ``\u1234``.

    Args:
        tracebacks: also print what is logged for debugging, with tracebacks of failures that do not end a command.

    Raises:
        BrokenPipeError: whoever read the output has gone, as ``head`` does.
        OSError: the output cannot be written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setLevel(logging.DEBUG if tracebacks else logging.WARNING)
    handler.setFormatter(_Escaped())
    ours, before = logging.getLogger("sparserefine"), (logging.lastResort, warnings.formatwarning)
    logging.lastResort, warnings.formatwarning = handler, _warning  # of libraries that set up no output of their own
    ours.addHandler(handler)
    level = ours.level
    if tracebacks:
        ours.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        logging.lastResort, warnings.formatwarning = before
        if sys.stdout is not None:
            sys.stdout.flush()


def print_error(text: str) -> None:
    """Prints text to standard error, each of its lines escaped and of a length that can be read."""
    if sys.stderr is None:  # closed; print would take the output in its place
        return
    print("\n".join(_shortened(printable(line)) for line in text.split("\n")), file=sys.stderr)


def _shortened(line: str) -> str:
    """The beginning says what is wrong, the end says the cure; values between them may have any length."""
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... ({len(line)} characters) ... {line[-_LONGEST // 4 :]}"


def reader_has_left() -> bool:
    """Whether the process at the other end of standard output has closed it."""
    try:
        sys.stdout.flush()
        descriptor = sys.stdout.fileno()
    except BrokenPipeError:
        return True
    except (AttributeError, OSError, ValueError):  # there is none, or one without a file
        return False
    if not hasattr(select, "poll"):  # Windows
        return False
    asked = select.poll()
    asked.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in asked.poll(0))


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

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{printable(filename)}:{lineno}: {category.__name__}: {printable(message)}\n"
