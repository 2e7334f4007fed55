"""Times a training step part by part: the chosen engines in turn, and crops alone. See benchmarks/README.md.

python -m benchmarks.training --json runs/training.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import check_run, chosen, machine, number, print_table, write_report
from sparserefine import BaseConfig, RefinerConfig, Selector, SparseRefiner
from sparserefine.bases.load import load_base
from sparserefine.data.batches import CropBatch
from sparserefine.data.crops import AugmentConfig, CropDataset
from sparserefine.data.loader import CropLoader
from sparserefine.data.readers.dataset import Dataset, Sample
from sparserefine.data.readers.hrf import HRF_CLASSES, hrf
from sparserefine.engines.choose import get_engine
from sparserefine.studies.demo import demo_refiner_folder
from sparserefine.training.losses import refinement_loss

HRF = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "hrf"
ENGINES = ("auto", "torch", "cpu", "triton")
PRECISIONS = ("32-true", "bf16-mixed")
PARTS = ("cut", "make", "forward", "backward", "optimiser")
_MAX_NORM = 1.0


@dataclass(frozen=True)
class Record:
    """One row of the table of steps.

    Attributes:
        engine: its name.
        precision: ``32-true`` or ``bf16-mixed``.
        device: ``cpu`` or the GPU's name.
        threads: of the processor.
        batch: crops per step.
        sites: median number of a step.
        step_ms: median time of a step.
        steps_s: steps per second, of that.
        crops_s: crops per second, of that.
        parts_ms: median times of cutting crops out, making them, forward, backward, and the optimiser's step.
    """

    engine: str
    precision: str
    device: str
    threads: int
    batch: int
    sites: int
    step_ms: float
    steps_s: float
    crops_s: float
    parts_ms: dict[str, float]


class Training:
    """A refiner with what trains it, on one engine.

    Args:
        engine: its name.
        data: images and labels; their logits come from the demo's base.
        logits: of each image.
        augment: the crops.
        precision: of the steps.
        device: where they run.
        threshold: entropy above which a pixel is a site [nats].
    """

    def __init__(
        self,
        engine: str,
        data: Dataset,
        logits: list[Tensor],
        augment: AugmentConfig,
        precision: str,
        device: str,
        threshold: float = 0.2,
    ) -> None:
        torch.manual_seed(0)
        self.augment, self.precision, self.device = augment, precision, torch.device(device)
        self.refiner = SparseRefiner(
            _base(), RefinerConfig(selector=Selector(threshold)), classes=data.classes, engine=engine
        ).to(self.device)
        self.refiner.train()
        self.refiner.base.eval()
        self.crops = CropDataset(data, lambda i, _: logits[i], augment, 0, 4.0, pin=self.device.type == "cuda")
        self.optimiser = torch.optim.AdamW(list(self.refiner.trained_parameters()), lr=1e-3)
        self.rounds: list[dict[str, float]] = []

    def round(self, number: int, batch: int) -> None:
        """One step, timed part by part."""
        times = dict.fromkeys(PARTS, 0.0)

        @contextmanager
        def part(name: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = 1e3 * (time.perf_counter() - start)

        with part("cut"):
            crops = [self.crops[number * batch + index] for index in range(batch)]
        with part("make"):
            made = CropBatch.of(crops, self.augment.crop, self.device)
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with part("forward"), mixed:
            result = self.refiner.refine(made.image, made.logits, windows=made.parts, valid=made.valid)
            truth = result.sites.gather(made.label[:, None])[:, 0]
            loss = refinement_loss(result.sparse_logits, result.refined_logits, truth, 0.5)
        with part("backward"):
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        with part("optimiser"):
            torch.nn.utils.clip_grad_norm_(list(self.refiner.trained_parameters()), _MAX_NORM)
            self.optimiser.step()
        self.rounds.append({**times, "sites": len(result.sites), "step": sum(times.values())})

    def record(self, engine: str, batch: int) -> Record:
        """Medians of the rounds."""
        of = {key: median(one[key] for one in self.rounds) for key in self.rounds[0]}
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        steps = 1e3 / of["step"]
        parts = {name: of[name] for name in PARTS}
        sites, threads = round(of["sites"]), torch.get_num_threads()
        return Record(engine, self.precision, device, threads, batch, sites, of["step"], steps, steps * batch, parts)


def loader_rates(training: Training, batch: int, threads: Sequence[int], batches: int) -> dict[int, float]:
    """Crops per second that the loader alone gives, made on the device, by its number of threads; cache filled."""
    rates = {}
    for count in threads:
        start = 0.0
        for index, crops in enumerate(CropLoader(training.crops, batch, batches + 1, count)):
            CropBatch.of(crops, training.augment.crop, training.device)
            if training.device.type == "cuda":
                torch.cuda.synchronize()
            if index == 0:
                start = time.perf_counter()
        rates[count] = batches * batch / (time.perf_counter() - start)
    return rates


def _base() -> torch.nn.Module:
    config = BaseConfig(f"unet:{demo_refiner_folder() / 'base.safetensors'}", ratio=0.25)
    return load_base(config, HRF_CLASSES)


def images(root: Path, count: int, tiny: Path | None) -> Dataset:
    """The first images of HRF's training part; with ``tiny``, small ones of noise, written there."""
    if tiny is None:
        data = hrf(root, "06-07")
        return replace(data, samples=data.samples[:count])
    samples = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (90, 120, 3), generator=generator, dtype=torch.uint8)
        paths = tiny / f"{index}.png", tiny / f"{index}_label.png"
        Image.fromarray(pixels.numpy()).save(paths[0])
        Image.fromarray((pixels[..., 0] > 128).to(torch.uint8).numpy()).save(paths[1])
        samples.append(Sample(str(index), *paths))
    return Dataset(tuple(samples), HRF_CLASSES)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the records to this JSON file")
    parser.add_argument("--data", type=Path, default=HRF, help="folder of HRF; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--engines", default="auto,torch", help="comma-separated; default: %(default)s")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated; default: %(default)s")
    parser.add_argument("--batch", type=int, default=2, help="crops per step; default: %(default)s")
    parser.add_argument("--images", type=int, default=3, help="images; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each; one more comes first")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--loader-threads", default="0,2", help="of the crops alone; default: %(default)s")
    parser.add_argument("--rehearse", action="store_true", help="small images of noise: every step, no figures")
    given = parser.parse_args(arguments)
    try:
        check_run(given.rounds, given.json)
        engines = chosen(given.engines, ENGINES, "engine")
        precisions = chosen(given.precisions, PRECISIONS, "precision")
        for engine in engines:
            if engine != "auto":
                get_engine(engine)  # says why it is missing
        if not given.rehearse and not given.data.is_dir():
            raise ValueError(f"{given.data}: no folder; pass --data FOLDER of HRF, or --rehearse")
        torch.set_num_threads(given.threads)
        with tempfile.TemporaryDirectory() as scratch:
            _run(given, engines, precisions, Path(scratch))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def _run(given: argparse.Namespace, engines: list[str], precisions: list[str], scratch: Path) -> None:
    print(machine(), flush=True)
    data = images(given.data, given.images, scratch if given.rehearse else None)
    side = 48 if given.rehearse else 768
    augment = AugmentConfig((side, side), (0.75, 1.33), 1.0, flip_vertical=True)
    base = _base().to(given.device)
    logits = [base(data.read(i)[0][None].to(given.device))[0].cpu().half() for i in range(len(data))]
    records = []
    for precision in precisions:
        trainings = {
            name: Training(name, data, logits, augment, precision, given.device, 1e-9 if given.rehearse else 0.2)
            for name in engines
        }
        for index in range(given.rounds + 1):
            for training in trainings.values():
                training.round(index, given.batch)
        for name, training in trainings.items():
            del training.rounds[0]
            records.append(training.record(name, given.batch))
    peers = {record.precision: record.steps_s for record in records if record.engine == "torch"}
    rows = [
        (
            record.precision,
            record.engine,
            number(record.step_ms, ".1f"),
            number(record.steps_s, ".2f"),
            number(record.crops_s, ".2f"),
            number(peers.get(record.precision) and record.steps_s / peers[record.precision], ".2f", "x"),
            *(number(record.parts_ms[part], ".1f") for part in PARTS),
        )
        for record in records
    ]
    header = ("precision", "engine", "step ms", "steps/s", "crops/s", "vs torch", *(f"{part} ms" for part in PARTS))
    first = records[0]
    title = f"{first.device}, {first.threads} threads, batch {first.batch}: {side} x {side} px, {first.sites} sites"
    print_table(title, header, rows)
    counts = [int(count) for count in given.loader_threads.split(",")]
    rates = loader_rates(trainings[engines[0]], given.batch, counts, 10 * given.rounds)
    for count, rate in rates.items():
        print(f"crops alone, {count} loader threads: {rate:.1f} crops/s")
    write_report(given.json, records)


if __name__ == "__main__":
    main()
