"""Tensors in safetensors files: a full disk, and files that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sparserefine.files.tensors import check_finite, read_header, read_tensors, write_tensors
from sparserefine.files.whole import written_whole


def file_of(path: Path, header: object, data: bytes = bytes(4)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_read_back_with_their_header(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(2, 3).t(), "b": torch.tensor(float("nan")), "c": torch.arange(3)}
    write_tensors(tmp_path / "file", tensors, {"who": "we"})
    found = read_tensors(tmp_path / "file")
    assert all(torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in tensors.items())
    assert read_header(tmp_path / "file") == {"who": "we"}


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has an error of its own for it, which is none."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sparserefine.files.tensors.save_file", full)
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"file: cannot be written \(.*No space left"), written_whole(path) as temporary:
        write_tensors(temporary, {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


LIES = {
    "nothing": b"",
    "a header longer than any memory": (2**63).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (10**8).to_bytes(8, "little") + b"{}",
    "brackets": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "no JSON": (2).to_bytes(8, "little") + b"{:",
}
WRONG = {
    "a size that no memory holds": {"a": entry([10**12], [0, 4 * 10**12])},
    "a size that no number holds": {"a": entry([2**40, 2**40], [0, 4])},
    "a negative size": {"a": entry([-1], [0, 4])},
    "two in one place": {"a": entry([1], [0, 4]), "b": entry([1], [0, 4])},
    "a hole": {"a": entry([1], [4, 8])},
    "a dtype that is none": {"a": entry([1], [0, 4], "F33")},
}


@pytest.mark.parametrize("case", [*LIES, *WRONG])
def test_files_that_lie_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if case in LIES:
        path.write_bytes(LIES[case])
    else:
        file_of(path, WRONG[case])
    for read in (read_tensors, read_header):
        with pytest.raises(ValueError, match=r"file: not a safetensors file, or cut short") as error:
            read(path)
        assert len(str(error.value).splitlines()) == 1


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for read in (read_tensors, read_header):
        with pytest.raises(FileNotFoundError, match="none: no such file"):
            read(tmp_path / "none")
        with pytest.raises(ValueError, match="is a FIFO"):
            read(tmp_path / "fifo")
        with pytest.raises(ValueError, match="is a folder"):
            read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_that_are_not_finite(dtype: torch.dtype) -> None:
    good = {"a": torch.zeros(3, dtype=dtype), "n": torch.arange(3), "empty": torch.zeros(0, dtype=dtype)}
    check_finite(good, "file")
    bad = torch.tensor([0, float("nan"), -float("inf")], dtype=dtype)
    with pytest.raises(ValueError, match=r"^file: 2 of 3 values of b\\n are NaN or infinite$"):
        check_finite({**good, "b\n": bad}, "file")
