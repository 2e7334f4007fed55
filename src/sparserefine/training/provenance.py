"""Where and with what a program runs: versions, machine, command, state of the project around it."""

from __future__ import annotations

import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sparserefine import __version__

_LIBRARIES = ("torch", "lightning", "numpy", "pillow", "triton", "transformers", "timm", "onnxruntime", "rasterio")
_GIT_S = 5
"""Longest time [s] to wait for git."""
_RUNS_PROGRAMS = r"^(filter|include|includeif|extensions)\."
"""Settings of a repository with which ``git status`` runs programs, or that may lead to such settings."""


def provenance(device: torch.device, precision: str, engine: str) -> dict[str, Any]:
    """What tells this start of a program from others, as values for JSON.

    Args:
        device: where it computes.
        precision: how.
        engine: name of the engine in use.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": precision,
        "engine": engine,
        "threads": torch.get_num_threads(),
        "versions": {
            "sparserefine": __version__,
            "python": platform.python_version(),
            **_versions(),
        },
        "git": _git_state(),
    }


def _versions() -> dict[str, str]:
    """Versions of the libraries that results depend on, of those that are installed; none is imported for it."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_state() -> dict[str, str | bool | None] | None:
    """Revision of the project in the current folder, and whether files differ from it; ``None`` outside a project.

    Only reads: a repository's own settings can name programs for git to run, so with such settings whether it is dirty
    is not asked (``None``).
    """
    revision = _git("rev-parse", "HEAD")
    if revision is None:
        return None
    dirty = None
    if _git("config", "--local", "--get-regexp", _RUNS_PROGRAMS) is None:
        status = _git("status", "--porcelain", "--ignore-submodules=all", "--untracked-files=no")
        dirty = None if status is None else bool(status)
    return {"revision": revision, "dirty": dirty}


def _git(*arguments: str) -> str | None:
    """Output of a git command; ``None`` if it fails, is missing or takes too long."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_S, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
