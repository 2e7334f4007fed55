"""Kinds of files, what reads each of them, and bad files of each kind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from chaos import bad_images, bad_models, bad_texts, project

NODES = ("FIFO", "device", "folder", "socket", "link to nothing", "link to itself", "missing", "empty")
"""What may be in the place of a file."""


@dataclass(frozen=True)
class Reader:
    """What reads a kind of file.

    Attributes:
        file: where the file lies in the project.
        calls: functions that read it, given its path; they return anything.
        commands: command lines that read it.
        weight: its share of the cases.
        named: whether messages name the file; those about a configuration may name the key instead.
        instead: what they may name in the place of the file: what it names.
    """

    file: str
    calls: tuple[Callable[[Path], object], ...]
    commands: tuple[tuple[str, ...], ...]
    weight: int = 1
    named: bool = True
    instead: tuple[str, ...] = ()


def readers() -> dict[str, Reader]:
    from sparserefine import BaseConfig, SparseRefiner
    from sparserefine.bases.checkpoint import read_checkpoint
    from sparserefine.bases.class_map import read_class_map
    from sparserefine.bases.families.onnx import onnx
    from sparserefine.bases.families.unet import load_unet
    from sparserefine.bases.load import load_base
    from sparserefine.data.readers.folder import folder
    from sparserefine.data.readers.labels import LabelCode, LabelsConfig
    from sparserefine.data.readers.pairs import pairs_csv
    from sparserefine.files.images import read_image
    from sparserefine.files.labels import read_label
    from sparserefine.images.classes import Classes, read_classes

    def refiner(path: Path) -> object:
        return SparseRefiner.from_pretrained(path.parent)

    def base_of(kind: str) -> Callable[[Path], object]:
        return lambda path: load_base(BaseConfig(f"{kind}:{path}", ratio=0.5), Classes.numbered(2))

    def label_map(path: Path) -> object:
        return LabelCode.of(LabelsConfig(map=str(path)), two)

    two = Classes(("ground", "line"), ((0, 0, 0), (255, 0, 0)))
    predict = ("predict", "FILE", "--refiner", "refiner", "--out", "out")
    with_refiner = ("predict", "data/images/0.png", "--refiner", "refiner", "--out", "out")
    from_stored = ("train", "config.yaml", "--logits.source", "stored", "--out", "new")
    resume = ("train", "config.yaml", "--resume")
    logits = ("logits", "config.yaml", "--logits.folder", "new")
    configured = (("logits", "FILE", *logits[2:]), ("train", "FILE", "--training.steps", "3", "--out", "new"))
    return {
        "image": Reader("bad", (read_image, read_image, read_image), (predict,), 8),
        "label": Reader("bad", (read_label, read_label), (), 3),
        "picture": Reader("data/images/0", (), (logits,), 1),
        "config": Reader("bad.yaml", (), configured, 6, named=False),
        "refiner": Reader("refiner/config.json", (refiner, refiner), (with_refiner,), 4, instead=("base '",)),
        "weights": Reader("refiner/model.safetensors", (refiner, refiner), (with_refiner,), 4),
        "unet": Reader("base.safetensors", (load_unet,), (logits,), 3),
        "pth": Reader("bad.pth", (read_checkpoint, read_checkpoint), (), 3),
        "onnx": Reader("bad.onnx", (onnx, base_of("onnx")), ((*logits, "--base.name", "onnx:bad.onnx"),), 3),
        "classmap": Reader("bad.yaml", (lambda path: read_class_map(path, two, two),), (), 2),
        "labelmap": Reader("bad.yaml", (label_map,), (), 1),
        "table": Reader("data/pairs.csv", (lambda path: pairs_csv(path.parent, "train"),), (), 1),
        "classes": Reader("data/classes.txt", (read_classes,), (logits,), 1),
        "list": Reader("data/train.txt", (lambda path: folder(path.parent, "train"),), (logits,), 1),
        "logits": Reader("logits/0.safetensors", (), (from_stored,), 3),
        "checkpoint": Reader("run/last.ckpt", (), (resume,), 2),
        "run": Reader("run/config.json", (), (resume,), 2),
        "lock": Reader("out/.sparserefine.lock", (), (with_refiner,), 1),
    }


class Corpus:
    """Makes bad files from the good ones of a project; the same for the same seed, kind and number."""

    def __init__(self, template: Path, seed: int, known: dict[str, Reader]) -> None:
        self.seed, self.readers = seed, known
        self.images = bad_images.good()
        self.liars = bad_images.liars()
        self.template = template
        self.onnx = bad_models.good_onnx()
        self.checkpoint = bad_models.good_checkpoint({"weight": torch.ones(3, 2), "bias": torch.zeros(3)})
        for kind in ("pth", "onnx"):  # makes what all cases share, before workers are forked
            self._bytes(kind, 0, random.Random(0))

    def make(self, kind: str, number: int, reader: Reader, stage: Path) -> tuple[Path, str]:
        """Puts case ``number`` of a kind into the project; the bad file, and what is wrong with it."""
        generator = random.Random(f"{self.seed}/{kind}/{number}")
        path = stage / reader.file
        path.parent.mkdir(exist_ok=True)
        if number % 5 == 3 and number // 5 < len(NODES):
            if kind in ("image", "label", "picture"):
                path = path.with_name(f"{path.name}.png")
            _put_node(path, NODES[number // 5])
            return path, NODES[number // 5]
        data, what, suffix = self._bytes(kind, number, generator)
        if suffix:
            path.with_name(f"{path.name}.png").unlink(missing_ok=True)
            path = path.with_name(f"{path.name}.{suffix}")
        path.write_bytes(data)
        if kind == "weights":  # or else its digest gives it away
            config = path.with_name("config.json")
            values = json.loads(config.read_text())
            values["weights_sha256"] = hashlib.sha256(data).hexdigest()
            config.write_text(json.dumps(values))
        return path, what

    def _bytes(self, kind: str, number: int, generator: random.Random) -> tuple[bytes, str, str]:
        if kind in ("image", "label", "picture"):
            if number % 2 and number // 2 < len(self.liars):
                suffix, data, what = self.liars[number // 2]
            else:
                suffix, data, what = bad_images.spoilt(number // 2, generator, self.images)
            return data, what, suffix
        match kind:
            case "config":
                data, what = bad_texts.bad_yaml(number, generator, project.CONFIG)
            case "refiner" | "run" | "lock":
                path = self.template / self.readers[kind].file if kind != "lock" else None
                values = (
                    json.loads(path.read_text()) if path else {"host": "a", "process": 1, "started": 1.0, "what": "b"}
                )
                data, what = bad_texts.bad_json(number, generator, values)
            case "weights" | "unet" | "logits":
                sample = (self.template / self.readers[kind].file).read_bytes()
                data, what = bad_models.bad_safetensors(number, generator, sample)
            case "pth":
                data, what = bad_models.bad_checkpoint(number, generator, self.checkpoint)
            case "checkpoint":
                sample = (self.template / "run" / "last.ckpt").read_bytes()
                data, what = bad_models.bad_checkpoint(number, generator, sample)
            case "onnx":
                data, what = bad_models.bad_onnx(number, generator, self.onnx) if self.onnx else (b"", "")
            case "classmap" | "labelmap":
                data, what = bad_texts.bad_class_map(number, generator)
            case "classes":
                data, what = bad_texts.bad_classes(number, generator)
            case _:
                data, what = bad_texts.bad_list(number, generator)
        return data, what, ""


def _put_node(path: Path, node: str) -> None:
    path.unlink(missing_ok=True)
    match node:
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "socket":
            here = Path.cwd()
            os.chdir(path.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(path.name)
            os.chdir(here)
        case "link to nothing":
            path.symlink_to("nothing")
        case "link to itself":
            path.symlink_to(path.name)
        case "empty":
            path.touch()
