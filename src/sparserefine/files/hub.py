"""Files of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def hub_snapshot(name: str | Path, *patterns: str) -> Path:
    """Fetches files of a repository of the hub, where they are not in its cache already.

    Args:
        name: what was asked for where a folder or a hub id, ``user/repository``, may stand; it is no folder.
        patterns: names of the files, ``*`` matches anything.

    Returns:
        The folder in the cache; files that the repository does not have are missing there.

    Raises:
        FileNotFoundError: not a hub id, unknown to the hub, no way to the hub, or no ``huggingface_hub`` here.
    """
    if isinstance(name, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder; expected one written by save_pretrained, or a hub id")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no such folder; if it is a hub id, `pip install huggingface_hub` lets me fetch it"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(f"{name}: no such folder, and the hub gave none of that id ({first_line})") from error
