"""Runs functions in forked children: torch is imported once, and a child that dies or hangs takes nothing with it."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_LEFT_OUT = ("test", "antigravity", "this", "idlelib")
"""Modules that do something when they are imported."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        code: its exit code; minus the signal's number if a signal ended it.
        stdout: what it printed.
        stderr: the same, of errors, bars and warnings.
        seconds: from its start to its end.
        peak_mb: most memory that it held, that of the parent included [MB].
        timed_out: it ran past its time and was killed.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_mb: float
    timed_out: bool

    @property
    def signal(self) -> int:
        """The signal that ended it; 0 if none did."""
        return max(0, -self.code)


class Child:
    """A forked child that runs ``work`` in ``folder`` and exits with the code that it returns.

    An exception of ``work`` is printed with its traceback, and the child exits with 1, as Python does.

    Args:
        work: what to run.
        folder: its working directory.
        environment: variables to set for it.
    """

    def __init__(self, work: Callable[[], int], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipes = [os.pipe(), os.pipe()]  # no files: a child may be forbidden to write any
        self._output = [b"", b""]
        ready, told = os.pipe()
        self._started = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            _run(work, folder, [write for _, write in self._pipes], told, environment or {})  # does not return
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        self._ready = time.monotonic() - self._started
        for read, write in self._pipes:
            os.close(write)
            os.set_blocking(read, False)

    def signal(self, number: int) -> None:
        """Sends a signal, unless the child has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0, *, at: tuple[float, int] | None = None) -> Outcome:
        """Waits for the end.

        Args:
            timeout: seconds since the start after which the child is killed.
            at: seconds since ``work`` began, and the signal to send then.
        """
        timed_out = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            seconds = time.monotonic() - self._started
            self._read()
            if pid:
                break
            if at is not None and seconds >= self._ready + at[0]:
                self.signal(at[1])
                at = None
            if seconds > timeout and not timed_out:
                timed_out = True
                self.signal(signal.SIGUSR2)  # where do its threads stand?
                time.sleep(0.5)
                self.signal(signal.SIGKILL)
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started
        for read, _ in self._pipes:
            os.close(read)
        stdout, stderr = (text.decode(errors="replace") for text in self._output)
        return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, seconds, usage.ru_maxrss / 1024, timed_out)

    def _read(self) -> None:
        """Takes what the child has printed."""
        for index, (read, _) in enumerate(self._pipes):
            with contextlib.suppress(BlockingIOError):
                while part := os.read(read, 1 << 16):
                    self._output[index] += part


def _run(work: Callable[[], int], folder: Path, output: list[int], told: int, environment: Mapping[str, str]) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), *output)):
            os.dup2(descriptor, number)
        # A test runner may have put objects of its own in the place of these.
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        os.write(told, b".")
        os.close(told)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def run(work: Callable[[], int], folder: Path, timeout: float = 120.0, **options: Any) -> Outcome:
    """Runs ``work`` in a :class:`Child` and waits for it."""
    return Child(work, folder, **options).wait(timeout)


def result_of(work: Callable[[], Any], folder: Path, timeout: float = 120.0) -> Any:
    """What ``work`` returns in a child; raises ``RuntimeError`` if it fails."""
    with tempfile.NamedTemporaryFile(prefix="chaos-result-") as file:

        def store() -> int:
            Path(file.name).write_bytes(pickle.dumps(work()))
            return 0

        outcome = run(store, folder, timeout)
        if outcome.code:
            raise RuntimeError(f"exit {outcome.code}\n{outcome.stderr[-4000:]}")
        return pickle.loads(Path(file.name).read_bytes())


def preload(work: Callable[[], object], folder: Path) -> None:
    """Imports here what ``work`` imports when it runs in a child, so that later children need not."""

    def names() -> list[str]:
        work()
        return sorted(sys.modules)

    for name in result_of(names, folder):
        if name.partition(".")[0] not in _LEFT_OUT and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    if threading.active_count() != 1 or len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("importing started a thread; forked children could wait for its locks for ever")


def with_one_thread() -> None:
    """Starts this program again, if libraries could start threads in it."""
    if any(os.environ.get(name) != "1" for name in ONE_THREAD):
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def limit_memory(more: int) -> None:
    """Lets this process map only ``more`` bytes above what it has mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
