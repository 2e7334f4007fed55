"""SIGTERM as an exception, so that a stopped program cleans up as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import FrameType

_CLEAN_UP_S = 5
"""Repeated signals are ignored for so long [s] after one that was raised."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived. What handles Ctrl-C handles it too."""


@contextmanager
def sigterm_raises(numbers: Sequence[signal.Signals] = (signal.SIGTERM,)) -> Iterator[None]:
    """While the block runs, SIGTERM raises :class:`Terminated` in it, as Ctrl-C raises ``KeyboardInterrupt``.

    Repeats are ignored for a few seconds, so that they do not interrupt what cleans up after the first; then one is
    raised again, since Python drops an exception that it has to raise in a ``__del__`` or in a callback of a library.
    Libraries may turn the exception into another one, compiled ones into any: after SIGTERM each leaves the block as
    :class:`Terminated`, after Ctrl-C as ``KeyboardInterrupt``. Signals belong to the main thread; in another one this
    does nothing.

    Args:
        numbers: the signals that are raised so, instead of SIGTERM alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised_at: float | None = None
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        now = monotonic()
        if raised_at is None or now - raised_at >= _CLEAN_UP_S:
            raised_at = now
            raise Terminated(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in numbers}
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if raised_at is not None and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    except Exception as error:
        if raised_at is not None:
            raise Terminated from error
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
