"""Which machine, which process: what tells a running process from one that has ended."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path

import psutil


@cache
def this_machine() -> str:
    """Tells this machine from others of its name, and a container with process numbers of its own from its host."""
    return " ".join((socket.gethostname(), _read(Path("/etc/machine-id")), _namespace()))


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # not there on every Linux, nor elsewhere
        return ""


def _namespace() -> str:
    """Of process numbers: a container mostly has its own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def birth_of(process: int) -> str | None:
    """Tells a process from later ones with its number; ``None`` if there is none. Setting the clock changes nothing.

    On Linux the boot and the clock ticks between boot and start; elsewhere the time of its start. Empty: there is one,
    but this user may not see more of it.
    """
    try:
        if Path("/proc/self/stat").exists():
            ticks = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
            return f"{_read(Path('/proc/sys/kernel/random/boot_id'))} {ticks}"
        return f"{psutil.Process(process).create_time():.0f}"
    except (OSError, psutil.Error):
        return "" if psutil.pid_exists(process) else None
