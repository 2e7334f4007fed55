"""Files and folders that are written completely or not at all. Everything this package writes goes through here."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sparserefine.files.text import first_line
from sparserefine.machine.process import this_machine

NEXT = ".sparserefine-next"
"""Folder in which :func:`folder_written_whole` keeps complete files until all have their final names."""
_OLD_S = 86_400
"""Age [s] from which a temporary file counts as left behind, if its process cannot be seen to have ended."""


@contextmanager
def written_whole(path: str | Path, *, keep: str | Path | None = None) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; if the block succeeds, the file there becomes ``path``.

    The file is synced to disk before the rename and the folder after it, so a killed process or a power cut leaves the
    old file or the new one. If the block fails, ``path`` stays as it was. A missing folder is made. A link at ``path``
    is replaced by the file; what it leads to stays as it is.

    Args:
        path: the file to write.
        keep: name for the file that ``path`` held before; default: it is replaced.

    Raises:
        OSError: the file cannot be written; the message names ``path`` and the cure.
    """
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / temporary_name()
        temporary.open("xb").close()
    try:
        with _explained(path, temporary):
            yield temporary
            _sync(temporary)
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: str | Path, last: str) -> Iterator[Path]:
    """Yields an empty folder; if the block succeeds, the files in it replace those of the same names in ``folder``.

    A killed process never leaves a mixture: the complete files are first renamed together to ``folder/NEXT`` and then
    moved one by one, ``last`` as the last one. A reader that finds ``NEXT`` takes each file from there or else from
    ``folder``: these are the new files. Other files in ``folder`` are left alone.

    Args:
        folder: made if missing.
        last: name of the file that is moved last: once it is in place, all are.

    Raises:
        OSError: a file cannot be written; a reader finds the old files, or the new ones if ``NEXT`` is complete.
    """
    folder = Path(folder)
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        _move_from_next(folder, last)  # an earlier write that was interrupted here
        temporary = folder / temporary_name()
        temporary.mkdir()
    try:
        with _explained(folder, temporary):
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync_folder(temporary)
            temporary.replace(folder / NEXT)
            _sync_folder(folder)
            _move_from_next(folder, last)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_from_next(folder: Path, last: str) -> None:
    staged = folder / NEXT
    if not staged.is_dir():
        return
    for file in sorted(staged.iterdir(), key=lambda file: file.name == last):
        if file.name == last:
            _sync_folder(folder)  # the other files' new names reach the disk first
        file.replace(folder / file.name)
    staged.rmdir()
    _sync_folder(folder)


def sweep(folder: str | Path) -> None:
    """Removes temporary files that killed processes left in ``folder``; those of running processes stay."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or not _left_behind(path, host=match[1], process=int(match[2])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


_TEMPORARY = re.compile(r"\.sparserefine-([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.tmp")


def temporary_name() -> str:
    """A new hidden name, short enough beside any name that a file system allows; it tells whose it is."""
    return f".sparserefine-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _host() -> str:
    return hashlib.sha256(this_machine().encode()).hexdigest()[:8]


def _left_behind(path: Path, host: str, process: int) -> bool:
    """Whether the process that made this temporary file has ended."""
    try:
        made = path.lstat().st_mtime
    except OSError:  # gone in the meantime
        return False
    if host == _host() and not psutil.pid_exists(process):
        return True
    # A process of that number runs, here or elsewhere; it may be another one, but none takes so long over a file.
    return time.time() - made > _OLD_S


@contextmanager
def _explained(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of writing name ``path``, not the temporary file, and say what to do. Errors of other files pass."""
    try:
        yield
    except OSError as error:
        about = None if error.filename is None else Path(str(error.filename))
        mine = (path, path.parent, temporary)
        if isinstance(error.__cause__, OSError):  # explained already, by a file written inside this block
            raise
        if about is not None and about not in mine and (temporary is None or temporary not in about.parents):
            raise
        raise unwritable(path, error, "free space or choose another place, then repeat") from error


def unwritable(place: object, error: OSError, cure: str) -> OSError:
    """The same kind of error, saying what cannot be written, why, and what to do."""
    explained = type(error)(f"{place}: cannot be written ({error.strerror or first_line(error)}); {cure}")
    explained.errno = error.errno
    return explained


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _sync_folder(folder: Path) -> None:
    """Syncs the names in a folder to disk, where the system can (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)
