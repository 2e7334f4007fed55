"""Times the sparse U-Net: this package's engines and spconv, by preset, mask and threads. See benchmarks/README.md.

python -m benchmarks.sparse_unet --json runs/sparse_unet.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    ROOT,
    Job,
    Measurement,
    Renamed,
    WorkerError,
    check_run,
    chosen,
    chosen_threads,
    default_threads,
    find_mask,
    machine,
    measure,
    number,
    print_table,
    read_mask,
    sgemm_gflops,
    site_features,
    write_report,
)
from sparserefine.engines.choose import get_engine
from sparserefine.engines.cpu.network import PackedNetwork
from sparserefine.sparse import Sites, SparseBatchNorm, SparseUNet
from sparserefine.stages.extractor import PRESETS, ExtractorConfig

ENGINES = ("torch", "cpu", "spconv")
DEFAULT_MASKS = "street0_05pct,street0_10pct,street0_20pct,street0_30pct"
CHANNELS, CLASSES = 3, 19
TOLERANCE = 1e-3  # relative rms error; above it, an engine's result is wrong


@dataclass(frozen=True)
class Record:
    """One row of the table; times are medians over the rounds.

    Attributes:
        engine: ``torch``, ``cpu`` or ``spconv``.
        preset: name of the preset.
        mask: stem of the mask's file.
        threads: threads of the worker.
        sites: N.
        geometry_ms: sites -> plan with all tables; for spconv, the part of its forward that searches for neighbours.
        forward_ms: features and plan -> logits.
        ms: sum of geometry and forward.
        gflops: 2 MACs / forward time [1e9/s]; MACs are those of ``SparseUNet.macs``, for every engine.
        sgemm_gflops: rate of a dense matrix product on this machine with as many threads [1e9/s].
        sgemm_share: gflops / sgemm_gflops; it may exceed 1 with Winograd's algorithm.
        peak_mb: peak memory beyond network, mask and features [MB], packed weights included.
        difference: relative rms difference of the logits from the torch engine's; ``None`` if that was not run.
        levels_ms: time of each level, from an extra round; ``None`` if the engine cannot measure it.
        instruction_set: instruction set of engine ``cpu``; else ``None``.
        machine: processor and torch's version.
    """

    engine: str
    preset: str
    mask: str
    threads: int
    sites: int
    geometry_ms: float
    forward_ms: float
    ms: float
    gflops: float
    sgemm_gflops: float
    sgemm_share: float
    peak_mb: float
    difference: float | None
    levels_ms: list[float] | None
    instruction_set: str | None
    machine: str


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    presets: list[str]
    masks: list[Path]
    threads: list[int]
    engines: list[str]
    rounds: int
    spconv_python: Path
    report: Path | None


class EngineTask:
    """Times one engine of this package."""

    def __init__(
        self,
        engine: str,
        mask: str,
        weights: str,
        channels: int,
        classes: int,
        planes: list[int],
        blocks: int,
        down: Any,
    ) -> None:
        self._engine = get_engine(engine)
        with torch.device("meta"):
            self._network = SparseUNet(channels, classes, planes, blocks, down).eval()
        self._network.load_state_dict(torch.load(weights, weights_only=True), assign=True)
        self._sites = Sites.from_mask(read_mask(mask)[None])
        self._features = site_features(len(self._sites), channels)

    def start(self) -> None:
        """Packs the network if the engine supports it."""
        self._packed = self._engine.prepare(self._network)
        self._forward = self._packed or self._network

    def round(self) -> dict[str, float]:
        """Makes the plan of new sites, so that nothing is cached, and runs a forward on it."""
        self._logits = None
        sites = replace(self._sites, coords=self._sites.coords.clone())
        with torch.inference_mode():
            start = time.perf_counter()
            plan = self._engine.geometry(sites, self._network.spec)
            if isinstance(self._packed, PackedNetwork):
                self._packed.tables(plan)  # made when first read; their time belongs to the geometry
            middle = time.perf_counter()
            self._logits = self._forward(self._features, plan)
            end = time.perf_counter()
        return {"geometry_ms": 1e3 * (middle - start), "forward_ms": 1e3 * (end - middle)}

    def output(self) -> Tensor | None:
        """Logits ``[N, K]`` of the last round."""
        return self._logits

    def details(self) -> dict[str, Any]:
        """Instruction set and time of each level [ms]."""
        return {"instruction_set": self._instruction_set(), "levels_ms": self._levels_ms()}

    def _instruction_set(self) -> str | None:
        if self._engine.name != "cpu":
            return None
        from sparserefine.engines.cpu.native.library import load

        return load().name

    def _levels_ms(self) -> list[float] | None:
        if not isinstance(self._packed, PackedNetwork):
            return None
        levels: list[float] = []
        with torch.inference_mode():
            plan = self._engine.geometry(self._sites, self._network.spec)
            self._packed(self._features, plan, levels_ms=levels)
        return levels


class Run:
    """One run of the benchmark: its options, the stored weights and the machine's rates."""

    def __init__(self, options: Options, scratch: Path) -> None:
        self._options, self._scratch = options, scratch
        self._left_out: dict[str, str] = {}
        self._machine = machine()
        print(self._machine)
        self._sgemm = {threads: sgemm_gflops(threads) for threads in options.threads}
        for threads, gflops in self._sgemm.items():
            print(f"sgemm, {threads} thread{'s' if threads > 1 else ''}: {gflops:.0f} GFLOP/s", flush=True)
        for preset in options.presets:
            torch.save(random_network(PRESETS[preset]).state_dict(), self._weights(preset))

    def _weights(self, preset: str) -> Path:
        return self._scratch / f"{preset}.pt"

    def mask(self, mask: Path) -> list[Record]:
        """Measures every preset, number of threads and engine on one mask."""
        records = []
        sites = Sites.from_mask(read_mask(str(mask))[None])
        for preset in self._options.presets:
            macs = _macs(preset, sites)
            for threads in self._options.threads:
                jobs = {name: self._job(name, preset, mask) for name in self._engines(threads)}
                found = measure(jobs, threads, self._options.rounds, self._left_out, self._scratch)
                reference = found["torch"].output if "torch" in found else None
                for engine, measured in found.items():
                    difference = None if reference is None else _relative_rms(measured.output, reference)
                    place = (engine, preset, mask.stem, threads)
                    records.append(self._record(place, len(sites), macs, measured, difference))
        if not records:
            raise WorkerError("no engine works here; the lines above say why")
        return records

    def _engines(self, threads: int) -> list[str]:
        """The engines to run; spconv only with one thread, as its CPU scatter has a data race with several."""
        return [name for name in self._options.engines if name != "spconv" or threads == 1]

    def _job(self, engine: str, preset: str, mask: Path) -> Job:
        config = PRESETS[preset]
        setup = {
            "engine": engine,
            "mask": str(mask),
            "weights": str(self._weights(preset)),
            "channels": CHANNELS,
            "classes": CLASSES,
            "planes": config.planes,
            "blocks": config.blocks,
            "down": config.down,
        }
        if engine == "spconv":
            return Job("benchmarks.spconv_worker:SpconvTask", setup, str(self._options.spconv_python))
        return Job("benchmarks.sparse_unet:EngineTask", setup)

    def _record(
        self, place: tuple[str, str, str, int], sites: int, macs: int, measured: Measurement, difference: float | None
    ) -> Record:
        engine, preset, mask, threads = place
        geometry, forward = measured.median("geometry_ms"), measured.median("forward_ms")
        gflops, sgemm = 2e-6 * macs / forward, self._sgemm[threads]
        return Record(
            engine,
            preset,
            mask,
            threads,
            sites,
            geometry,
            forward,
            geometry + forward,
            gflops,
            sgemm,
            gflops / sgemm,
            measured.peak_mb,
            difference,
            measured.details.get("levels_ms"),
            measured.details.get("instruction_set"),
            self._machine,
        )


def random_network(config: ExtractorConfig) -> SparseUNet:
    """A network in evaluation mode with seeded weights and non-trivial batch normalisation statistics."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = SparseUNet(CHANNELS, CLASSES, config.planes, config.blocks, config.down)
        for module in network.modules():
            if isinstance(module, SparseBatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
    return network.eval()


def _macs(preset: str, sites: Sites) -> int:
    config = PRESETS[preset]
    with torch.device("meta"):
        network = SparseUNet(CHANNELS, CLASSES, config.planes, config.blocks, config.down)
    return network.macs(get_engine("torch").geometry(sites, network.spec))


def _relative_rms(logits: Tensor, reference: Tensor) -> float:
    difference = (logits.double() - reference.double()).norm()
    return float(difference / reference.double().norm())


def _print_records(mask: str, records: Sequence[Record]) -> None:
    """Prints the table of one mask; ratios say how many times faster a row is than torch and spconv."""
    times = {(r.engine, r.preset, r.threads): r.ms for r in records}
    rows = []
    for r in records:
        torch_ms, spconv_ms = times.get(("torch", r.preset, r.threads)), times.get(("spconv", r.preset, 1))
        wrong = " WRONG" if r.difference is not None and not r.difference <= TOLERANCE else ""
        rows.append(
            (
                r.preset,
                r.engine + (f" ({r.instruction_set})" if r.instruction_set else ""),
                str(r.threads),
                number(r.geometry_ms, ".1f"),
                number(r.forward_ms, ".1f"),
                number(r.ms, ".1f"),
                number(torch_ms and torch_ms / r.ms, ".2f", "x"),
                number(spconv_ms and spconv_ms / r.ms, ".2f", "x"),
                number(r.gflops),
                number(100 * r.sgemm_share, ".0f", " %"),
                number(r.peak_mb),
                number(r.difference, ".1e") + wrong,
            )
        )
    header = ("preset", "engine", "threads", "geometry ms", "forward ms", "ms", "vs torch", "vs spconv, 1 thread")
    header += ("GFLOP/s", "of sgemm", "peak MB", "rms from torch")
    print_table(f"{mask}: {records[0].sites} sites", header, rows)
    for r in records:
        if r.levels_ms:
            levels = ", ".join(f"{ms:.1f}" for ms in r.levels_ms)
            print(f"{r.preset}, {r.engine}, {r.threads} thread{'s' if r.threads > 1 else ''}: levels {levels} ms")


def _options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_unet", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the records to this JSON file")
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--plans", action=Renamed, const="--presets", help=argparse.SUPPRESS)
    parser.add_argument(
        "--masks", default=DEFAULT_MASKS, help="names in ../shared/masks, or PNG files; default: %(default)s"
    )
    parser.add_argument(
        "--threads", default=default_threads(), help="numbers of threads, comma-separated; default: %(default)s"
    )
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each engine; default: %(default)s")
    parser.add_argument(
        "--spconv-python",
        type=Path,
        default=Path(".venv-spconv/bin/python"),
        help="Python with spconv; default: %(default)s",
    )
    given = parser.parse_args(arguments)
    check_run(given.rounds, given.json)
    return Options(
        chosen(given.presets, tuple(PRESETS), "preset"),
        [find_mask(name.strip()) for name in given.masks.split(",")],
        chosen_threads(given.threads),
        chosen(given.engines, ENGINES, "engine"),
        given.rounds,
        ROOT / given.spconv_python,
        given.json,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options = _options(arguments)
        records: list[Record] = []
        with tempfile.TemporaryDirectory() as scratch:
            run = Run(options, Path(scratch))
            for mask in options.masks:
                new = run.mask(mask)
                _print_records(mask.stem, new)
                records += new
                write_report(options.report, records)  # after each mask, so that an interrupted run keeps its results
    except (ValueError, WorkerError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
