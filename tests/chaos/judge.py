"""What must hold of the files of a run, whenever it was killed. Stands on the formats' own libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

HIDDEN = ".sparserefine"
"""What names of temporary files, of locks and of folders in the making start with."""
STAGED = ".sparserefine-next"
"""A folder of complete files that have not got their final names yet."""


def finals(folder: Path) -> Iterator[Path]:
    """Files under their final names, and complete ones that wait for it."""
    for path in sorted(folder.rglob("*")):
        hidden = [p for p in path.relative_to(folder).parts if p.startswith(HIDDEN) and p != STAGED]
        if path.is_file() and not hidden:
            yield path


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.name.startswith(HIDDEN)]
    return [f"left behind: {path}" for path in sorted(found)]


def half_written(folder: Path) -> list[str]:
    """Files under their final names that do not load."""
    faults = []
    for path in finals(folder):
        try:
            _load(path)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:120]
            faults.append(f"half written: {path.relative_to(folder)}: {reason}")
    return faults


def _load(path: Path) -> None:
    match path.suffix:
        case ".png":
            with Image.open(path, formats=("PNG",)) as image:
                image.load()
            if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):  # Pillow does not miss it
                raise ValueError("the end is missing")
        case ".safetensors":
            load_file(path)
        case ".json":
            _strict(path.read_text(encoding="utf-8"))
        case ".jsonl":
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                raise ValueError("the last line is cut short")
            steps = [line["step"] for line in map(_strict, text.splitlines()) if "step" in line]
            if steps != sorted(set(steps)):
                raise ValueError(f"steps {steps} repeat or go back")
        case ".ckpt":
            torch.load(path, map_location="cpu", weights_only=True)


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


COMPARED = (".json", ".jsonl", ".png", ".safetensors")
OF_THE_RUN = ("run.json",)
"""Say when, where and how often a run was started, so no two are equal."""


def content(path: Path) -> Any:
    """What a file says, to compare it with that of another run: equal runs may write tensors in another order."""
    match path.suffix:
        case ".safetensors":
            with safe_open(path, framework="pt") as file:
                header = dict(file.metadata() or {})
            tensors = load_file(path)
            return header, {n: (str(t.dtype), tuple(t.shape), _bytes(t)) for n, t in sorted(tensors.items())}
        case ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            return {key: value for key, value in values.items() if not key.endswith("sha256")}
        case ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_bytes()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def differences(folder: Path, expected: Path, varying: frozenset[str]) -> list[str]:
    """Outputs that are missing, unexpected or not the same as in ``expected``, to the last bit.

    Args:
        folder: outputs of this run.
        expected: outputs of a run that nothing disturbed.
        varying: keys of JSON, in the form ``file:key``, that are no two times the same.
    """
    here, there = map(_compared, (folder, expected))
    faults = [f"missing: {name}" for name in sorted(set(there) - set(here))]
    faults += [f"unexpected: {name}" for name in sorted(set(here) - set(there))]
    for name in sorted(set(here) & set(there)):
        mine, theirs = (_without(content(path), name, varying) for path in (here[name], there[name]))
        if mine != theirs:
            what = sorted(key for key in mine if mine[key] != theirs.get(key)) if isinstance(mine, dict) else ""
            faults.append(f"differs from that of an undisturbed run: {name} {what or ''}".rstrip())
    return faults


def varying_in(one: Path, other: Path) -> frozenset[str]:
    """Keys of JSON that differ between two undisturbed runs: times, and what follows from them."""
    found = set()
    for name, path in _compared(one).items():
        pairs = []
        if path.suffix == ".json":
            pairs = [(content(path), content(other / name))]
        elif path.suffix == ".jsonl":
            pairs = list(zip(content(path), content(other / name), strict=False))
        found |= {f"{name}:{key}" for a, b in pairs for key in {*a, *b} if a.get(key) != b.get(key)}
    return frozenset(found)


def _compared(folder: Path) -> dict[str, Path]:
    found = {path.relative_to(folder).as_posix(): path for path in finals(folder)}
    return {n: p for n, p in found.items() if p.suffix in COMPARED and p.name not in OF_THE_RUN}


def _without(value: Any, name: str, varying: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: v for key, v in value.items() if f"{name}:{key}" not in varying and not _is_time(key)}
    if isinstance(value, list):
        return [_without(line, name, varying) for line in value]
    return value


def _is_time(key: str) -> bool:
    """Two runs may happen to take the same rounded time."""
    return any(word in key for word in ("seconds", "time", "_ms", "per_s", "_gb", "_mb", "memory", "started", "ended"))


def said(stderr: str) -> list[str]:
    """The lines of the program itself, without bars and warnings of libraries."""
    lines = [line for part in stderr.splitlines() for line in part.split("\r")]
    return [line for line in lines if line.startswith("sparserefine")]


def fault_of_message(stderr: str, code: int) -> list[str]:
    """A failure is one line, or one for each image that failed; nothing prints a traceback."""
    if "Traceback (most recent call last)" in stderr:
        last = next((line for line in reversed(stderr.splitlines()) if line and line[0] not in " \t"), "")
        return [f"traceback: {last[:160]}"]
    lines = said(stderr)
    of_images = [line for line in stderr.splitlines() if line.startswith("data/images/")]
    if code and len(lines) != 1 and not of_images:
        return [f"exit {code} with {len(lines)} lines, expected one: {stderr.strip()[-200:]!r}"]
    return []
