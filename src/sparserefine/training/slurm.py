"""SLURM: a job that is about to end is queued again, and the new one goes on from the checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparserefine.files import lock
from sparserefine.files.text import first_line
from sparserefine.machine.signals import Terminated, sigterm_raises

_log = logging.getLogger(__name__)
_SCONTROL_S = 60
"""Longest time [s] to wait for ``scontrol``."""


def job() -> str | None:
    """Number of the SLURM job that this process belongs to; ``None`` outside one."""
    return os.environ.get("SLURM_JOB_ID") or None


def restarted() -> bool:
    """Whether SLURM has started this job before."""
    return job() is not None and _restarts() != "0"


def _restarts() -> str:
    """How often SLURM has restarted this job."""
    return os.environ.get("SLURM_RESTART_COUNT") or "0"


def holder(requeue: bool) -> str:
    """Who holds the lock of a run, for :func:`sparserefine.files.lock.locked`."""
    return f"{_of_job()}, start {_restarts()}" if requeue and job() else "train"


def _of_job() -> str:
    return f"train in SLURM job {job()}"


def unlock_former_start(out: Path) -> None:
    """Removes the lock that an earlier start of this very job left, maybe on another machine: SLURM has ended it.

    The lock of another process of this start stays.
    """
    path = out / lock.NAME
    held = lock.holder_of(path) if path.is_file() else None
    if restarted() and held is not None and held.what != holder(True) and held.what.split(",")[0] == _of_job():
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
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}  # nothing interrupts `scontrol`
    try:
        with sigterm_raises(numbers):
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
