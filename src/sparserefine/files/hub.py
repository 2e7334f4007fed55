"""Downloads from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from sparserefine.files.text import first_line, printable


def hub_snapshot(name: str | Path, *patterns: str) -> Path:
    """Downloads files of a hub repository, unless they are in the local cache already.

    Args:
        name: a hub id, ``user/repository``. Callers accept a folder or a hub id and have found no such folder.
        patterns: names of the wanted files; ``*`` matches anything.

    Returns:
        The repository's folder in the cache. Files that the repository lacks are missing there.

    Raises:
        FileNotFoundError: ``name`` is not a hub id or the hub does not know it, the hub cannot be reached, or
            ``huggingface_hub`` is not installed.
    """
    shown = printable(name)
    if str(name) == "":
        raise FileNotFoundError("an empty path, expected a folder or a hub id; is a shell variable unset?")
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{shown}: no such folder; expected one written by save_pretrained, or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"{shown}: no such folder; if it is a hub id, `pip install huggingface_hub` to download it"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{shown}: no such folder, and downloading it from the hub failed ({printable(first_line(error))})"
        ) from error
