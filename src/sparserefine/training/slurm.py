"""SLURM: a job that is about to end is queued again, and the new one goes on from the checkpoint."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparserefine.files import lock
from sparserefine.files.text import first_line
from sparserefine.machine.signals import Terminated

_log = logging.getLogger(__name__)
_SCONTROL_S = 60
"""Longest time [s] to wait for ``scontrol``."""


def job() -> str | None:
    """Number of the SLURM job that this process belongs to; ``None`` outside one."""
    return os.environ.get("SLURM_JOB_ID") or None


def restarted() -> bool:
    """Whether SLURM has started this job before."""
    return job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def holder(requeue: bool) -> str:
    """Who holds the lock of a run, for :func:`sparserefine.files.lock.locked`."""
    return f"train in SLURM job {job()}" if requeue and job() else "train"


def unlock_former_start(out: Path) -> None:
    """Removes the lock that an earlier start of this very job left, maybe on another machine: SLURM has ended it."""
    path = out / lock.NAME
    try:
        held = json.loads(path.read_text(encoding="utf-8"))["what"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if restarted() and held == holder(True):
        path.unlink(missing_ok=True)


@contextmanager
def requeued_when_stopped() -> Iterator[None]:
    """Inside a job, SIGUSR1 (``sbatch --signal``) and SIGTERM stop the block and queue the job again.

    Both are raised as :class:`Terminated`, so the block leaves whole files. Ctrl-C does not queue anything.
    Outside a SLURM job this does nothing.

    Raises:
        ValueError: this is not the main thread, which alone can receive signals.
    """
    if job() is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("training.slurm_requeue = true in a thread; signals reach the main thread only, train there")
    received = False

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal received
        if not received:  # one is enough: a second must not interrupt what cleans up after the first
            received = True
            raise Terminated(f"{signal.Signals(number).name} from SLURM")

    before = {number: signal.signal(number, stop) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        yield
    except Terminated:
        _requeue()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _requeue() -> None:
    command = ["scontrol", "requeue", str(job())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_S, stdin=subprocess.DEVNULL)
        failure = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = first_line(error)
    if failure:
        _log.warning("`%s` failed (%s); submit the job again with --resume", " ".join(command), failure)
    else:
        _log.warning("queued SLURM job %s again; it goes on from the last checkpoint", job())
