"""SIGTERM as an exception, so that a stopped program cleans up as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived. What handles Ctrl-C handles it too."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """While the block runs, SIGTERM raises :class:`Terminated` in it, as Ctrl-C raises ``KeyboardInterrupt``.

    Further SIGTERM are ignored until the block has ended, so that they do not interrupt what cleans up after the first.
    Libraries may turn the exception into another one, compiled ones into any: after SIGTERM each leaves the block as
    :class:`Terminated`, after Ctrl-C as ``KeyboardInterrupt``. Signals belong to the main thread; in another one this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = True
            raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if default:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if received and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    except Exception as error:
        if received:
            raise Terminated from error
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        if default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
