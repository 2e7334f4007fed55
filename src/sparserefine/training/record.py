"""What a training run writes down while it runs: scores as JSON lines, CSV and TensorBoard, and pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sparserefine.files.images import write_png
from sparserefine.files.text import printable
from sparserefine.files.whole import sweep, unwritable, written_whole

_log = logging.getLogger(__name__)

_Row = dict[str, Any]
"""A row of the log: ``step``, a whole number, and values by name: numbers or ``None``."""
_PICTURE = re.compile(r".+_step(\d{7,})\.png")
_MAX_NAME = 100
"""Characters of a sample's name in the name of a picture."""


class RunRecord:
    """The records of a run, in its folder. No step is in them twice.

    - ``log.jsonl``: an object a line; what is not finite is ``null``.
    - ``log.csv``: the same rows as a table.
    - ``pictures/``: PNG files.
    - ``tensorboard/``: the same values and pictures, if the package ``tensorboard`` is installed.

    Args:
        out: folder of the run; made if missing.
        resumed_at: the step from which an interrupted run goes on. Records up to it stay; later ones are removed, and
            so is a line that was cut when the run was killed. Default: a new run; records of a former one are removed.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, out: Path, *, resumed_at: int | None = None) -> None:
        self._lines, self._table, self._pictures = out / "log.jsonl", out / "log.csv", out / "pictures"
        last = -1 if resumed_at is None else resumed_at
        self._start_with([row for row in _rows(self._lines) if row["step"] <= last])
        sweep(self._pictures)
        for path in self._pictures.glob("*.png"):
            match = _PICTURE.fullmatch(path.name)
            if match is not None and int(match[1]) > last:
                path.unlink()
        self._board = _board(out / "tensorboard", resumed_at)
        self._former_hook = threading.excepthook
        if self._board is not None:
            threading.excepthook = self._unless_of_board

    def scores(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Writes a row; it is on the disk when this returns. Earlier rows of this step or later ones are removed.

        Args:
            step: optimiser steps so far.
            values: by name; ``None`` and what is not finite is ``null`` in JSON, empty in CSV, missing in TensorBoard.

        Raises:
            OSError: a file cannot be written.
        """
        if self._rows and self._rows[-1]["step"] >= step:
            self._start_with([row for row in self._rows if row["step"] < step])
        row: _Row = {"step": step, **values}
        row = {name: value if value is not None and math.isfinite(value) else None for name, value in row.items()}
        _append(self._lines, _json([row]))
        self._rows.append(row)
        if row.keys() <= self._columns.keys():
            _append(self._table, _csv([row], self._columns, header=False))
        else:
            self._write_table()
        if self._board is not None:
            with _writing(self._board):
                for name, value in row.items():
                    if value is not None and name != "step":
                        self._board.add_scalar(name, value, step)
                self._board.flush()

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Stores a picture.

        Args:
            step: optimiser steps so far.
            name: of the sample it shows.
            pixels: ``uint8 [3, H, W]``.

        Raises:
            OSError: the file cannot be written.
        """
        write_png(self._pictures / f"{_file_name(name)}_step{step:07d}.png", pixels)
        if self._board is not None:
            with _writing(self._board):
                self._board.add_image(printable(name), pixels.cpu(), step)

    def close(self) -> None:
        """Ends the records; TensorBoard writes what it holds back.

        Raises:
            OSError: that cannot be written.
        """
        if self._board is None:
            return
        try:
            with _writing(self._board):
                self._board.close()
        finally:
            if threading.excepthook == self._unless_of_board:
                threading.excepthook = self._former_hook

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(self, _: object, failure: BaseException | None, __: object) -> None:
        """Closes; an error of the block is not replaced by one of closing."""
        try:
            self.close()
        except OSError as error:
            if failure is None:
                raise
            _log.warning("%s", error)

    def _unless_of_board(self, arguments: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread keeps its error for the next call of the writer; a traceback would say it twice."""
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            self._former_hook(arguments)

    def _start_with(self, rows: list[_Row]) -> None:
        """Makes ``rows`` the whole log."""
        self._rows = rows
        with written_whole(self._lines) as temporary:
            temporary.write_text(_json(rows), encoding="utf-8")
        self._write_table()

    def _write_table(self) -> None:
        self._columns = dict.fromkeys(name for row in self._rows for name in row)  # an ordered set
        with written_whole(self._table) as temporary:
            temporary.write_text(_csv(self._rows, self._columns, header=True), encoding="utf-8")


def _rows(path: Path) -> list[_Row]:
    """The rows of a log in the order of their steps; what is no row, such as a line that was cut, is left out."""
    found: dict[int, _Row] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            # Logs of version 0.1 may hold NaN, which is no JSON.
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found[row["step"]] = row
    return [row for _, row in sorted(found.items())]


def _json(rows: Sequence[_Row]) -> str:
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _csv(rows: Sequence[_Row], columns: Mapping[str, Any], *, header: bool) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(columns), lineterminator="\n")
    if header and columns:
        writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error, "free space, then --resume") from error


def _file_name(name: str) -> str:
    """A name for files on any system. Names of samples may hold slashes, and anything else."""
    plain = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)[:_MAX_NAME].lstrip(".")
    return plain if plain == name else f"{plain}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def _board(folder: Path, resumed_at: int | None) -> Any:
    """TensorBoard's writer into ``folder``; ``None`` if TensorBoard is not installed."""
    if resumed_at is None:
        for file in folder.glob("events.out.tfevents.*"):
            file.unlink()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.info("the package tensorboard is not installed: scores are in log.jsonl and log.csv only")
        return None
    # Hides what a killed run wrote after the step that it goes on from.
    return SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)


@contextmanager
def _writing(board: Any) -> Iterator[None]:
    """Errors of TensorBoard's writer name its folder."""
    try:
        yield
    except OSError as error:
        raise unwritable(board.log_dir, error, "free space, then go on with --resume") from error
