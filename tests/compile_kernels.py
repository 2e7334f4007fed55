"""Compiles the GPU kernels for real GPUs, without one, and tells what came out, in lines of JSON.

    python tests/compile_kernels.py [--all] [--arch 90 80] [--only WORD]

The package's own code launches them, with tensors of real sizes on the CPU; each launch is stopped once its kernel is
compiled, so results are whatever the memory held. Without ``--all``: one GPU and float16. A fresh ``TRITON_CACHE_DIR``
makes sure that everything is compiled. One line for each kernel as compiled, one for each case: which of these it
needs. The exit status is 1 if any kernel has problems: a refusal, spilled registers, no matrix instructions, and such.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from sparserefine.engines.triton import engine, launch
from sparserefine.engines.triton.engine import TritonEngine
from sparserefine.images.coarse import Coarse
from sparserefine.images.uncertainty import label_dtype
from sparserefine.images.upsampling import Upsampling
from sparserefine.sparse import Plan, SparseBatchNorm, SparseUNet
from sparserefine.sparse.sites import PaddedSites, Sites
from sparserefine.stages.ensembler import GatedEnsembler
from sparserefine.stages.extractor import PRESETS, ExtractorConfig

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = ("HGMMA", "HMMA", "FFMA", "LDGSTS", "LDG", "STG", "LDL", "STL")
SHARED = {80: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory of a program; of capability 8.x not what the largest GPUs have, but what all have."""
MATRIX = {80: "HMMA", 90: "HGMMA"}
FEW = 4
"""READ of the kernel where inputs have hardly any channels."""
LARGEST_GRID = (2**31 - 1, 65535, 65535)
SIZE = (1024, 2048)
IMAGES = {"one image": 300_000, "another image": 281_111, "many sites": 1_500_000}
"""Their sites; of many, some layers are cut into larger blocks."""
CHOSEN = IMAGES["one image"]
PLANS = {
    **PRESETS,
    "flat": ExtractorConfig((32,), blocks=1),
    "small": ExtractorConfig((32, 32), blocks=1, down="cell"),
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
UPSAMPLING = {
    "logits": Upsampling(),
    "nearest": Upsampling("nearest", input_size=(512, 1024)),
    "scores": Upsampling(outputs="scores"),
}
Case = Callable[[], object]


class NoGpu:
    """What Triton asks of the driver of a GPU before it launches: here the number of a device is its kind."""

    arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """Takes the place of launches: compiles for each kind of GPU, prints each kernel once, keeps those of a case."""

    def __init__(self, archs: Sequence[int], listed: bool) -> None:
        self.archs, self.counts, self._listed = archs, [0], listed
        self.launches, self.failed = 0, False
        self.needed: dict[int, set[str]] = {}
        self._told: set[str] = set()
        self._compile = triton.JITFunction.run
        self._driver = NoGpu()
        driver.set_active(self._driver)
        triton.JITFunction.run = lambda kernel, *arguments, **options: self._launch(kernel, arguments, options)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        self.launches, self.needed = 0, {arch: set() for arch in self.archs}
        try:
            yield
        finally:
            for arch, kernels in self.needed.items():
                tell(case=name, arch=arch, launches=self.launches, kernels=sorted(kernels))

    def _launch(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.launches += 1
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        if kernel.__name__ == "scan":  # what it counts is the only thing that the host ever reads
            named["totals"].copy_(torch.tensor(self.counts, dtype=torch.int32))
        grid = options["grid"]
        if any(count > most for count, most in zip(grid, LARGEST_GRID, strict=False)):
            self._tell(kernel.__name__, f"grid of {kernel.__name__}", problems=[f"a grid of {grid}"])
        for arch in self.archs:
            self._driver.arch = arch
            started = time.perf_counter()
            try:
                compiled = self._compile(kernel, *arguments, **{**options, "warmup": True})
            except Exception as error:  # of any kind: the other kernels are to be seen, too
                facts = {**about(named, options), "arch": arch, "problems": [f"{type(error).__name__}: {error}"]}
                self._tell(kernel.__name__, f"refused {kernel.__name__} {facts}", **facts)
                continue
            self.needed[arch].add(compiled.hash)
            if compiled.hash not in self._told:
                seconds = round(time.perf_counter() - started, 2)
                facts = {
                    **about(named, options),
                    "arch": arch,
                    "seconds": seconds,
                    **inspect(compiled, self._listed or "PRECISION" in options),
                }
                self._tell(kernel.__name__, compiled.hash, **facts, problems=problems(kernel.__name__, facts))

    def _tell(self, kernel: str, key: str, **facts: Any) -> None:
        self.failed |= bool(facts["problems"])
        if key not in self._told:
            self._told.add(key)
            tell(kernel=kernel, id=key, **facts)


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def about(named: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Of a launch, what tells kernels apart."""
    dtypes = [str(value.dtype).removeprefix("torch.") for value in named.values() if isinstance(value, Tensor)]
    return {
        "dtypes": dtypes,
        "inputs": named.get("c_in"),
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        "meta": {name: value for name, value in options.items() if name.isupper()},
    }


def problems(kernel: str, facts: dict[str, Any]) -> list[str]:
    """What makes a kernel slow, or fail when it is launched."""
    arch, meta, instructions = facts["arch"], facts["meta"], facts["instructions"]
    found = []
    if facts["stack"] or facts["local"]:
        found.append(f"{facts['stack'] + facts['local']} bytes of registers are spilled")
    if facts["shared"] > SHARED[arch]:
        found.append(f"{facts['shared']} bytes of shared memory")
    if "PRECISION" in meta and (facts["dtypes"][0] != "float32" or meta["PRECISION"] == "tf32"):
        # Where a weight has few channels, the blocks of its gradient are too small for the larger instructions.
        matrix = {MATRIX[arch]} if kernel == "convolve" else {"HGMMA", "HMMA"}
        if not matrix & instructions.keys():
            found.append("no matrix instructions")
        if kernel == "convolve" and meta["READ"] != FEW and facts["inputs"] % 16 == 0 and not facts["wide_copies"]:
            found.append("no copies of 16 bytes")
    return found


def inspect(compiled: Any, listed: bool) -> dict[str, Any]:
    """Registers, memory and, if ``listed``, which takes as long as some compilations, instructions."""
    path = Path(os.environ.get("TMPDIR", "/tmp"), f"sparserefine-{os.getpid()}.cubin")
    path.write_bytes(compiled.asm["cubin"])
    try:
        usage = tool("cuobjdump", "-res-usage", str(path))
        listing = tool("nvdisasm", "--print-code", "--no-dataflow", str(path)) if listed else ""
    finally:
        path.unlink()
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    counted = Counter(opcode.split(".")[0] for opcode in opcodes)
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": compiled.metadata.shared,
        "instructions": {name: counted[name] for name in INSTRUCTIONS if counted[name]},
        "wide_copies": sum(opcode.startswith("LDGSTS") and opcode.endswith(".128") for opcode in opcodes),
    }


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def network(preset: str, dtype: torch.dtype) -> SparseUNet:
    """Weights of no particular value: random ones take longer than all the rest."""
    with torch.device("meta"):
        net = PLANS[preset].build(19)
    return net.to_empty(device="cpu").to(dtype)


def counts_of(preset: str, sites: int) -> list[int]:
    """Sites of each level, about as those of uncertain pixels become fewer."""
    return [max(1, int(sites * 0.3**level)) for level in range(len(PLANS[preset].planes))]


def inference(recorder: Recorder, preset: str, dtype: torch.dtype, sites: int, padded: bool) -> None:
    """The plan of an image and a packed network."""
    net, mask = network(preset, dtype).eval(), torch.empty(1, *SIZE, dtype=torch.bool)
    recorder.counts, triton_engine = counts_of(preset, sites), TritonEngine()
    if padded:
        plan: Plan = triton_engine.padded_plan(mask, net.spec, recorder.counts)
    else:
        plan = triton_engine.plan(mask, net.spec)
    packed = triton_engine.prepare(net)
    assert packed is not None
    packed(torch.empty(sites, 3, dtype=dtype), plan)


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()  # as what follows overwrites it


def training(recorder: Recorder, preset: str, dtype: torch.dtype, sites: int) -> None:
    """Forward and backward; without normalisation, which is torch's."""
    net = network(preset, dtype)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, SparseBatchNorm):
                setattr(module, name, Copy())
    recorder.counts = counts_of(preset, sites)
    plan = TritonEngine().plan(torch.empty(1, *SIZE, dtype=torch.bool), net.spec)
    with torch.enable_grad():
        net(torch.empty(sites, 3, dtype=dtype), plan).sum().backward()


def selection() -> None:
    TritonEngine().keep_largest(torch.empty(1, *SIZE), torch.ones(1, *SIZE, dtype=torch.bool), 100_000)


def uncertainty(classes: int, dtype: torch.dtype, upsampling: Upsampling) -> None:
    """Labels and entropy of all pixels, logits at the sites."""
    logits = torch.zeros(1, classes, SIZE[0] // 8, SIZE[1] // 8, dtype=dtype)
    coarse = Coarse(logits, SIZE, upsampling)
    TritonEngine().uncertainty(coarse)
    TritonEngine().sample(coarse, chosen().coords)


def block_means(classes: int, dtype: torch.dtype, upsampling: Upsampling, masked: bool, channels: int = 3) -> None:
    """Of five levels."""
    coarse = Coarse(torch.zeros(1, classes, SIZE[0] // 8, SIZE[1] // 8, dtype=dtype), SIZE, upsampling)
    image = torch.zeros(1, channels, *SIZE, dtype=torch.uint8)
    valid = torch.ones(1, *SIZE, dtype=torch.bool) if masked else None
    TritonEngine().block_means(image, coarse, valid, torch.ones(channels), torch.zeros(channels), [chosen()] * 5)


def pixels(dtype: torch.dtype) -> None:
    TritonEngine().pixels(torch.zeros(1, 3, *SIZE, dtype=dtype), chosen().coords, torch.ones(3), torch.zeros(3))


def write_labels(classes: int, padded: bool) -> None:
    labels = torch.zeros(1, *SIZE, dtype=label_dtype(classes))
    sites = PaddedSites(chosen(), torch.empty(1, dtype=torch.int32)) if padded else chosen()
    TritonEngine().write_labels(labels, torch.zeros(CHOSEN, classes), sites)


def gated(classes: int, fuser: Literal["residual", "paper"]) -> None:
    logits = torch.zeros(CHOSEN, classes)
    GatedEnsembler(classes, fuser)(logits, logits.clone(), TritonEngine())


def chosen() -> Sites:
    return Sites(torch.zeros(CHOSEN, 3, dtype=torch.int32), 1, *SIZE)


def cases(recorder: Recorder, everything: bool) -> Iterator[tuple[str, Case]]:
    """Name of each, and what launches its kernels."""
    for dtype in DTYPES if everything else ("float16",):
        for preset in PRESETS if everything else ("paper",):
            for name, sites in IMAGES.items():
                yield f"{preset} {dtype}, {name}", partial(inference, recorder, preset, DTYPES[dtype], sites, False)
        for preset in PRESETS if everything else ("flat",):
            yield f"{preset} {dtype}, padded", partial(inference, recorder, preset, DTYPES[dtype], CHOSEN, True)
        for preset in PRESETS if everything else ("small",):
            yield f"{preset} {dtype}, training", partial(training, recorder, preset, DTYPES[dtype], CHOSEN)
    yield "selection", selection
    for classes in (2, 19, 150):
        for name, upsampling in UPSAMPLING.items():
            for dtype in DTYPES if everything else ("float16",):
                yield f"uncertainty {classes} {dtype}, {name}", partial(uncertainty, classes, DTYPES[dtype], upsampling)
        for name in ("logits", "scores"):
            for dtype in DTYPES if everything else ("float16",):
                of = classes, DTYPES[dtype], UPSAMPLING[name], name == "logits"
                yield f"block means {classes} {dtype}, {name}", partial(block_means, *of)
        for channels in (1, 4, 16) if classes == 2 or everything else ():
            of = classes, torch.float16, UPSAMPLING["logits"], True, channels
            yield f"block means {classes} float16, of {channels}", partial(block_means, *of)
    for classes in (2, 19, 150) if everything else (19,):
        for fuser in ("residual", "paper") if everything else ("residual",):
            yield f"gated {classes}, {fuser}", partial(gated, classes, fuser)
    for dtype in (torch.uint8, *DTYPES.values()) if everything else (torch.uint8,):
        yield f"pixels {dtype}".replace("torch.", ""), partial(pixels, dtype)
    for classes in (150, 300) if everything else (150,):
        for padded in (False, True):
            yield f"write_labels {classes}{', padded' * padded}", partial(write_labels, classes, padded)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="two kinds of GPU, all dtypes and presets")
    parser.add_argument("--arch", type=int, nargs="+", help="kinds of GPU, by compute capability")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set, so nothing would be compiled; unset it")
    launch.INTERPRETED = engine.INTERPRETED = True  # tensors of the CPU are taken; nothing is interpreted
    recorder = Recorder(options.arch or ((90, 80) if options.all else (90,)), options.all)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what the memory held is slow otherwise
    # The arithmetic of float32 is a choice of the caller's; "high" is TF32.
    for precision in ("high", "highest") if options.all else ("high",):
        torch.set_float32_matmul_precision(precision)
        for name, case in cases(recorder, options.all):
            if options.only in name and (precision == "high" or "float32, " in name or "gated" in name):
                with recorder.case(f"{name}, ieee" if precision == "highest" else name), torch.no_grad():
                    case()
    return int(recorder.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
