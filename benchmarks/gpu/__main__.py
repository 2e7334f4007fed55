"""Checks engine ``triton`` on a GPU, then times U-Net, uncertainty, training and models. See benchmarks/README.md.

python -m benchmarks.gpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import MASKS, ROOT, Renamed, chosen, find_mask, read_mask
from benchmarks.gpu.checks import checks
from benchmarks.gpu.device import DTYPES, Device, Gpu, Rehearsal
from benchmarks.gpu.parts import ceilings, models, training, uncertainty
from benchmarks.gpu.records import PARTS, Results, read_results, slug
from benchmarks.gpu.run import Options, Run, UncertaintyCase
from benchmarks.gpu.table import tables
from benchmarks.gpu.tilings import tilings
from benchmarks.gpu.unet import unet
from sparserefine.stages.extractor import PRESETS, ExtractorConfig

RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_MASKS = "street0_10pct,street0_05pct,street0_20pct,street0_30pct"
BATCHES = ("1", "2", "4", "8")
MODELS = ("hrnet_w48", "segformer_b5", "mask2former_t", "mask2former_l", "segnext_l")
CASES = (
    UncertaintyCase(19, (256, 512), (1024, 2048)),
    UncertaintyCase(2, (584, 876), (2336, 3504)),
    UncertaintyCase(150, (256, 512), (1024, 2048)),
)
TIMED: dict[str, Callable[[Run], None]] = {
    "ceilings": ceilings,
    "unet": unet,
    "uncertainty": uncertainty,
    "training": training,
    "models": models,
    "tilings": tilings,
}
NEED_MASKS = ("unet", "training", "tilings")
NEED_CEILINGS = ("unet", "uncertainty", "training", "tilings")

# Small enough for the interpreter to finish in seconds. It computes bfloat16 wrongly, so that is left out.
TINY_PRESETS = {
    "paper": ExtractorConfig((8, 16), 1, "paper"),
    "slim": ExtractorConfig((8, 16), 1, "cell"),
    "slim16": ExtractorConfig((8, 8, 8), 1, "paper"),
}
TINY_CASES = (UncertaintyCase(5, (3, 5), (8, 12)), UncertaintyCase(2, (3, 5), (6, 9)))
TINY_DTYPES = ("float16", "float32")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    default = ",".join(part for part in PARTS if part != "tilings")
    parser.add_argument(
        "--only", default=default, help=f"parts, comma-separated, of {', '.join(PARTS)}; default: %(default)s"
    )
    parser.add_argument("--presets", default=",".join(PRESETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--plans", action=Renamed, const="--presets", help=argparse.SUPPRESS)
    parser.add_argument("--masks", help=f"names in ../shared/masks, or PNG files; default: {DEFAULT_MASKS}")
    parser.add_argument("--batches", default="1,4", help="batch sizes, comma-separated; default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated; default: %(default)s")
    parser.add_argument("--models", default=",".join(MODELS), help="base models, comma-separated; default: %(default)s")
    parser.add_argument(
        "--budget-s", type=float, help="start no new measurement after this many seconds; checks always run"
    )
    parser.add_argument(
        "--json", type=Path, help="file that results are added to; default: benchmarks/results/<GPU>.json"
    )
    parser.add_argument(
        "--spconv-python",
        type=Path,
        help="Python with spconv; default: .venv-spconv/bin/python if it exists, else this one",
    )
    parser.add_argument("--table", type=Path, help="only print Markdown tables of this results file")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every step once on tiny inputs on the CPU; its times mean nothing"
    )
    return parser


def _options(given: argparse.Namespace) -> Options:
    parts = chosen(given.only, PARTS, "part")
    if given.budget_s is not None and not given.budget_s > 0:
        raise ValueError(f"budget = {given.budget_s:g} s, expected more than 0")
    if given.rehearse and given.json:
        raise ValueError("a rehearsal has no figures to write; leave out --json")
    files = [] if given.rehearse else _mask_files(given.masks)
    options = Options(
        tuple(part for part in PARTS if part in parts),
        {name: PRESETS[name] for name in chosen(given.presets, tuple(PRESETS), "preset")},
        {file.stem: read_mask(str(file)) for file in files},
        tuple(files),
        tuple(map(int, chosen(given.batches, BATCHES, "batch size"))),
        tuple(chosen(given.dtypes, tuple(DTYPES), "dtype")),
        CASES,
        tuple(chosen(given.models, MODELS, "model")),
        given.budget_s,
        _spconv_python(given.spconv_python),
    )
    return _tiny(options) if given.rehearse else options


def _mask_files(names: str | None) -> list[Path]:
    if names is None and not any(MASKS.glob("*.png")):
        return []  # parts that need masks are left out, with a message
    return [find_mask(name.strip()) for name in (names or DEFAULT_MASKS).split(",")]


def _spconv_python(given: Path | None) -> Path:
    default = ROOT / ".venv-spconv" / "bin" / "python"
    return given.absolute() if given else default if default.exists() else Path(sys.executable)


def _tiny(options: Options) -> Options:
    dtypes = tuple(dtype for dtype in TINY_DTYPES if dtype in options.dtypes)
    if not dtypes:
        raise ValueError(f"a rehearsal is in {' or '.join(TINY_DTYPES)}; pass one of them to --dtypes")
    masks: dict[str, Tensor] = {"tiny": torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.2}
    return Options(
        tuple(part for part in options.parts if part != "models"),
        {name: TINY_PRESETS[name] for name in options.presets},
        masks,
        (),
        (1,),
        dtypes,
        TINY_CASES,
        (),
        options.budget_s,
        options.spconv_python,
        side=64,
        copy_bytes=1 << 20,
    )


def _execute(run: Run) -> bool:
    """Runs all parts; returns whether all checks and measurements succeeded."""
    options = run.options
    if "checks" in options.parts:
        wrong = [check for check in checks(run) if not check.ok]
        if wrong:
            print(f"{len(wrong)} checks failed, so nothing is timed:", flush=True)
            for check in wrong:
                print(f"  {check.name}: error {check.error}, bound {check.bound:g}", flush=True)
            return False
    parts = [part for part in options.parts if part != "checks"]
    known = {"copy", *DTYPES} <= set(run.ceilings())
    if "ceilings" not in parts and not known and any(part in NEED_CEILINGS for part in parts):
        ceilings(run)
    for part in parts:
        if part in NEED_MASKS and not options.masks:
            run.leave_out(f"{part}: ../shared/masks is not there; pass --masks FILE.png[,FILE.png]")
        else:
            TIMED[part](run)
    for line in run.failures:
        print(f"FAILED {line}", flush=True)
    return not run.failures


def _results(given: argparse.Namespace, device: Device) -> Results:
    machine = device.machine()
    if device.rehearsal:
        return Results(None, machine)
    path = given.json or RESULTS / f"{slug(machine['gpu'])}.json"
    if given.json is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; make it first")
    return Results(path, machine)


def main(arguments: Sequence[str] | None = None) -> None:
    given = _parser().parse_args(arguments)
    try:
        if given.table is not None:
            print(tables(read_results(given.table)))
            return
        options = _options(given)
        device: Device = Rehearsal() if given.rehearse else Gpu()
        results = _results(given, device)
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    run = Run(options, device, results)
    print(", ".join(f"{key} {value}" for key, value in device.machine().items()), flush=True)
    succeeded = _execute(run)
    if given.rehearse:
        print("\nREHEARSAL: interpreted on the CPU, each step once. The figures below mean nothing.")
    print(f"\n{tables(results.content())}")
    if run.left_out:
        print(f"\nleft out: {len(run.left_out)}")
        for line in run.left_out:
            print(f"- {line}")
    if not succeeded:
        sys.exit(1)


if __name__ == "__main__":
    main()
