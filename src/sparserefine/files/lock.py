"""A lock on an output folder, so that two runs do not write into it at once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from sparserefine.files.text import printable
from sparserefine.files.whole import temporary_name, unwritable
from sparserefine.machine.process import birth_of, this_machine

NAME = ".sparserefine.lock"
_MOST_BYTES = 10_000
"""More than a lock file ever has."""
_JUST_MADE_S = 10
"""A lock file of unreadable content counts as held for so long [s]: where there are no hard links, its owner may be
writing it."""


class LockedError(ValueError):
    """Another run writes into the folder."""


@dataclass(frozen=True)
class Holder:
    """The run that holds a lock.

    Attributes:
        host: name of its machine.
        machine: :func:`~sparserefine.machine.process.this_machine` there.
        process: number of its process.
        birth: :func:`~sparserefine.machine.process.birth_of` that process.
        started: start time of its process [s since 1970], for messages.
        what: the run, in a word: ``train``, ``predict``.
    """

    host: str
    machine: str
    process: int
    birth: str
    started: float
    what: str

    @classmethod
    def this_process(cls, what: str) -> Holder:
        """This process, doing ``what``."""
        number = os.getpid()
        started = psutil.Process().create_time()
        return cls(socket.gethostname(), this_machine(), number, birth_of(number) or "", started, what)

    def has_ended(self) -> bool:
        """Whether its process has ended, as far as this machine can tell."""
        return self.machine == this_machine() and birth_of(self.process) not in (self.birth, "")

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"{self.what} (process {self.process} on {self.host}, started {since})"


@contextmanager
def locked(folder: str | Path, what: str) -> Iterator[None]:
    """Holds the lock of an output folder while the block runs. A lock whose process has ended is taken over.

    Args:
        folder: made if missing; folders that were made are removed again if nothing is in them at the end.
        what: this run, in a word, for the message that another run gets.

    Raises:
        ValueError: ``folder`` is a file, or something else than a file is in the place of the lock.
        LockedError: another run holds the lock, or one on another machine did and its end cannot be seen from here.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    made = [missing for missing in (folder, *folder.parents) if not missing.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ValueError(
            f"{printable(folder)}: is a file, expected a folder, or a new name, for the outputs"
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    path, mine = folder / NAME, Holder.this_process(what)
    while not _created(path, mine):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(f"{printable(path)}: is no lock of a run; delete it, or choose another folder")
        holder = holder_of(path)
        if holder is not None and not holder.has_ended():
            raise LockedError(
                f"{printable(folder)}: {printable(holder)} writes there; wait for it or choose another folder. "
                f"If it has ended, delete {printable(path)}"
            )
        if holder is None and path.exists() and time.time() - path.stat().st_mtime < _JUST_MADE_S:
            raise LockedError(
                f"{printable(folder)}: another run is starting there; wait for it or choose another folder"
            )
        _remove_stale(path, holder)
    try:
        yield
    finally:
        if holder_of(path) == mine:
            path.unlink(missing_ok=True)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _created(path: Path, holder: Holder) -> bool:
    """Makes the lock file; false if there is one. A process that is killed here leaves a whole one or none."""
    temporary = path.with_name(temporary_name())
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            _copy(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _copy(source: Path, path: Path) -> None:
    """Makes the lock file in two steps; false content of a moment counts as a run that is starting."""
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(source.read_text(encoding="utf-8"))
            file.flush()
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _remove_stale(path: Path, holder: Holder | None) -> None:
    """Removes the lock of a run that has ended, unless a third run has removed it and holds a new one by now."""
    try:
        with path.open("rb+") as file:  # some network file systems lock only what is open for writing
            if fcntl is not None:
                with suppress(OSError):  # others lock nothing; then two runs may remove at once, which is unlikely
                    fcntl.flock(file, fcntl.LOCK_EX)  # held by one remover at a time, while it looks and removes
            stale = os.path.samestat(os.fstat(file.fileno()), path.stat()) and holder_of(path) == holder
            if stale and fcntl is not None:
                path.unlink()
        if stale and fcntl is None:  # Windows removes no open file
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(folder: Path, error: OSError) -> OSError:
    return unwritable(printable(folder), error, "free space or choose another folder, then repeat")


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock of that path; ``None`` if the file is missing or holds something else."""
    if not path.is_file():  # opening a FIFO would wait
        return None
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES))
        host, machine, birth, what = (str(values[name]) for name in ("host", "machine", "birth", "what"))
        holder = Holder(host, machine, int(values["process"]), birth, float(values["started"]), what)
        time.localtime(holder.started)  # fails for a time that no calendar has
        return holder
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
