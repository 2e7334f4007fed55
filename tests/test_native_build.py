"""Building the kernels, loading them, and packages that carry them."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

import wheels
from sparserefine.commands.info import info_text
from sparserefine.engines.choose import engine_report, get_engine
from sparserefine.engines.cpu.engine import CpuEngine
from sparserefine.engines.cpu.kernels import kernels
from sparserefine.engines.cpu.native import build, library, structures

ROOT = Path(__file__).parents[1]
PACKAGE = "src/sparserefine/engines/cpu/native"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where :func:`build.build` builds to in this test, with objects of an older build in it."""
    objects = tmp_path / "objects"
    objects.mkdir()
    (objects / "generic.so").write_text("old")
    for name in ("OBJECTS", "NOTE", "DIGEST"):
        monkeypatch.setattr(build, name, objects / Path(getattr(build, name)).name if name != "OBJECTS" else objects)
    return objects


@pytest.fixture
def loading() -> Iterator[None]:
    """What is loaded is forgotten before and after the test."""
    library._load.cache_clear()
    kernels.cache_clear()
    yield
    library._load.cache_clear()
    kernels.cache_clear()


def program(path: Path, script: str) -> Path:
    """An executable of ``sh``."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def note_of(folder: Path) -> str:
    """The only file there: one line."""
    assert [file.name for file in folder.iterdir()] == [build.NOTE.name]
    text = (folder / build.NOTE.name).read_text()
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


# ---- building


def test_a_compiler_that_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert build.build() is False
    note = note_of(folder)
    assert "no C++ compiler" in note
    assert "$CXX = no-such-compiler -O2" in note
    assert "install g++" in note


def test_no_compiler_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() is None
    assert build.build() is False
    assert "g++, clang++, c++" in note_of(folder)


def test_a_compiler_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = program(tmp_path / "failing", "echo 'error: no such\n  instruction' >&2; exit 3")
    monkeypatch.setenv("CXX", str(failing))
    assert build.build() is False
    note = note_of(folder)
    assert "the C++ compiler failed" in note
    assert str(failing) in note
    assert len(note) < 400


def test_a_compiler_that_fails_later_leaves_no_object(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best instruction set compiles (to nothing), the next one does not."""
    last = build.instruction_sets()[-1]
    vectors = build.INSTRUCTION_SETS[last][0]
    fails = f'case "$*" in *-DVL={vectors}*) exit 1;; esac'
    writes = 'for out; do :; done; case "$*" in *" -o $out"*) : > "$out";; esac'
    monkeypatch.setenv("CXX", str(program(tmp_path / "half", f"{fails}\n{writes}\nexit 0")))
    assert build.build() is False
    assert "the C++ compiler failed" in note_of(folder)


def test_compiler_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++")
    assert build.compiler() == ["ccache", "g++"]


@pytest.mark.parametrize(
    ("machine", "names"),
    [("x86_64", ["avx512", "avx2", "generic"]), ("AMD64", ["avx512", "avx2", "generic"]), ("aarch64", ["generic"])],
)
def test_instruction_sets_of_machines(monkeypatch: pytest.MonkeyPatch, machine: str, names: list[str]) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    assert build.instruction_sets() == names


def test_digest_is_of_all_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in build.SOURCES.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    before = build.sources_digest()
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.sources_digest() == before
    sources = [path for path in tmp_path.iterdir() if path.suffix in (".cpp", ".h")]
    assert len(sources) >= 5
    for path in sources:
        text = path.read_text()
        path.write_text(text + "\n")
        assert build.sources_digest() != before, path.name
        path.write_text(text)


def test_the_pure_package_has_no_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On purpose, though there may be a compiler; the note tells those who install it where kernels are."""
    monkeypatch.setenv(build.PURE, "1")
    assert build.build() is False
    assert "without compiled kernels; on Linux, install the manylinux wheel" in note_of(folder)


@pytest.mark.parametrize("value", ["yes", "2"])
def test_a_switch_that_is_neither_on_nor_off(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(build.PURE, value)
    with pytest.raises(ValueError, match=rf"SPARSEREFINE_PURE is '{value}'; expected 1 .* or 0, or unset it"):
        build.build()
    assert (folder / "generic.so").is_file(), "what was there is gone"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_get_the_pure_package(folder: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """A compiler there would make objects that nobody can load, and a tag that pip refuses."""
    monkeypatch.setattr(build, "sys", SimpleNamespace(platform=system))
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled: {command}"))
    assert build.build() is False
    assert f"the compiled kernels need Linux, this is {system}" in note_of(folder)


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_needed_c_library_is_what_the_object_says(name: str) -> None:
    path = build.OBJECTS / f"{name}.so"
    if not path.is_file() or not shutil.which("readelf"):
        pytest.skip(f"needs {path.name} and readelf")
    lines = subprocess.run(["readelf", "-V", "-W", str(path)], capture_output=True, text=True, check=True).stdout
    versions = re.findall(r"Name: GLIBC_(\d+)\.(\d+)", lines)
    assert versions
    assert build.needed_glibc(path) == max((int(major), int(minor)) for major, minor in versions)


@pytest.mark.parametrize(
    ("objects", "tag"),
    [
        ([b"\0memcpy\0GLIBC_2.14\0GLIBC_2.2.5\0"], "py3-none-manylinux_2_17_m"),
        ([b"\0GLIBC_2.17\0", b"\0GLIBC_2.4\0GLIBC_2.34\0"], "py3-none-manylinux_2_34_m"),
        ([b"\0GLIBC_3.0\0"], "py3-none-manylinux_3_0_m"),
        ([b"\0GLIBC_2.14\0", b"\0memcpy\0"], "py3-none-linux_m"),
        ([b"\0GLIBC_2.14\0GLIBC_ABI_DT_RELR\0"], "py3-none-linux_m"),
        ([b"\0GLIBC_PRIVATE\0"], "py3-none-linux_m"),
    ],
    ids=["older than any policy", "the newest counts", "another major", "musl", "no number", "private"],
)
def test_tag_tells_the_c_library(folder: Path, monkeypatch: pytest.MonkeyPatch, objects: list[bytes], tag: str) -> None:
    for number, content in enumerate(objects):
        (folder / f"{('generic', 'avx2')[number]}.so").write_bytes(content)
    monkeypatch.setattr(build.platform, "machine", lambda: "m")
    assert build.wheel_tag() == tag


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_objects_need_the_c_library_alone(name: str) -> None:
    """Neither torch, Python nor OpenMP: one build serves every version of them."""
    path = build.OBJECTS / f"{name}.so"
    if not path.is_file():
        pytest.skip(f"{path.name} was not built")
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    lines = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", lines)
    assert set(needed) <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert "RPATH" not in lines
    assert "RUNPATH" not in lines


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_objects_show_their_entry_points_alone(name: str) -> None:
    path = build.OBJECTS / f"{name}.so"
    if not path.is_file() or not shutil.which("readelf"):
        pytest.skip(f"needs {path.name} and readelf")
    lines = subprocess.run(
        ["readelf", "--dyn-syms", "-W", str(path)], capture_output=True, text=True, check=True
    ).stdout
    defined = [line.split()[7] for line in lines.splitlines() if " FUNC " in line and " UND " not in line]
    assert "sr_convolve" in defined
    assert all(symbol.startswith("sr_") or symbol in ("_init", "_fini") for symbol in defined), defined


# ---- loading


@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
def test_an_instruction_set_is_forced(name: str, monkeypatch: pytest.MonkeyPatch, loading: None) -> None:
    if name not in library.available():
        pytest.skip(f"{name}: not built, or this processor lacks it")
    monkeypatch.setenv(library.CHOICE, name)
    engine = get_engine("auto")
    assert isinstance(engine, CpuEngine)
    assert engine.kernels.library.name == name
    assert engine.kernels.library.lanes == build.INSTRUCTION_SETS[name][0]
    assert engine_report()["cpu"].startswith(f"available: {name}")
    half = "by AVX512-BF16" if engine.kernels.has_bf16 else "computed in float32"
    assert f"; training in bfloat16 {half}" in engine_report()["cpu"]
    if name != "avx512":
        assert not engine.kernels.has_bf16


def test_without_a_choice_it_is_the_best(monkeypatch: pytest.MonkeyPatch, loading: None) -> None:
    monkeypatch.delenv(library.CHOICE, raising=False)
    usable = library.available()
    if not usable:
        pytest.skip("no objects")
    assert library.load().name == usable[0]


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch, loading: None) -> None:
    monkeypatch.setenv(library.CHOICE, "avx1024")
    with pytest.raises(ValueError, match=r"engine 'cpu' cannot be used here.*'avx1024'.*SPARSEREFINE_CPU.*avx512"):
        get_engine("cpu")
    assert get_engine("auto").name == "torch"
    (line,) = [line for line in info_text().splitlines() if line.startswith("engine cpu ")]
    assert "instruction set 'avx1024' is not known" in line
    (line,) = [line for line in info_text().splitlines() if line.startswith("engine auto ")]
    assert "torch" in line


def test_switched_off(monkeypatch: pytest.MonkeyPatch, loading: None) -> None:
    monkeypatch.setenv(library.CHOICE, "torch")
    assert get_engine("auto").name == "torch"
    with pytest.raises(ValueError, match="switched off by SPARSEREFINE_CPU=torch"):
        get_engine("cpu")
    assert engine_report()["cpu"] == "switched off by SPARSEREFINE_CPU=torch"
    assert engine_report()["auto"].startswith("torch")


def test_no_objects(monkeypatch: pytest.MonkeyPatch, loading: None, tmp_path: Path) -> None:
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    assert library.available() == []
    assert get_engine("auto").name == "torch"
    assert engine_report()["auto"].startswith("torch")
    assert engine_report()["cpu"] == f"no objects in {tmp_path}; reinstall"
    with pytest.raises(ValueError, match="engine 'cpu' cannot be used here: no objects in"):
        get_engine("cpu")


def test_no_objects_and_why(monkeypatch: pytest.MonkeyPatch, loading: None, tmp_path: Path) -> None:
    (tmp_path / build.NOTE.name).write_text("not built: no C++ compiler was found\n")
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    assert engine_report()["cpu"] == "not built: no C++ compiler was found"


def test_an_object_that_was_not_built(monkeypatch: pytest.MonkeyPatch, loading: None, tmp_path: Path) -> None:
    if not library.available():
        pytest.skip("no objects")
    shutil.copy(build.OBJECTS / "generic.so", tmp_path)
    shutil.copy(build.DIGEST, tmp_path)
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    assert library.available() == ["generic"]
    assert library.load().name == "generic"
    with pytest.raises(library.Unavailable, match=r"'avx2': it was not built; usable here: generic"):
        library.load("avx2")


def test_an_object_that_does_not_load(monkeypatch: pytest.MonkeyPatch, loading: None, tmp_path: Path) -> None:
    (tmp_path / "generic.so").write_text("no object")
    (tmp_path / build.DIGEST.name).write_text(build.sources_digest())
    monkeypatch.setenv(library.FOLDER, str(tmp_path))
    with pytest.raises(library.Unavailable, match=r"generic\.so does not load"):
        library.load()
    assert get_engine("auto").name == "torch"


@pytest.mark.parametrize("digest", ["of other sources", None], ids=["another digest", "no digest"])
def test_objects_of_other_sources(
    monkeypatch: pytest.MonkeyPatch, loading: None, tmp_path: Path, digest: str | None
) -> None:
    (tmp_path / "generic.so").write_text("old")
    if digest:
        (tmp_path / build.DIGEST.name).write_text(digest)
    monkeypatch.setattr(library, "OBJECTS", tmp_path)
    monkeypatch.setattr(library, "DIGEST", tmp_path / build.DIGEST.name)
    with pytest.raises(library.Unavailable, match="built from other sources; reinstall"):
        library.load()
    assert get_engine("auto").name == "torch"


def _resized(structure: type[ctypes.Structure]) -> type[ctypes.Structure]:
    """The same with one field more."""
    fields = {"_fields_": (*structure._fields_, ("more", ctypes.c_int64))}
    return type(structure.__name__, (ctypes.Structure,), fields)


@pytest.mark.parametrize("structure", structures.STRUCTURES, ids=lambda structure: structure.__name__)
def test_structures_of_other_sizes(
    monkeypatch: pytest.MonkeyPatch, loading: None, structure: type[ctypes.Structure]
) -> None:
    if not library.available():
        pytest.skip("no objects")
    library._load.cache_clear()
    size, name = ctypes.sizeof(structure), structure.__name__
    monkeypatch.setattr(structures, "STRUCTURES", (_resized(structure),))
    words = rf"structure {name} has {size} bytes there, {size + 8} bytes here; reinstall"
    with pytest.raises(library.Unavailable, match=words):
        library.load()
    assert get_engine("auto").name == "torch"


def test_a_structure_that_the_object_does_not_know(monkeypatch: pytest.MonkeyPatch, loading: None) -> None:
    if not library.available():
        pytest.skip("no objects")
    library._load.cache_clear()
    unknown = type("Unknown", (ctypes.Structure,), {"_fields_": (("more", ctypes.c_int64),)})
    monkeypatch.setattr(structures, "STRUCTURES", (*structures.STRUCTURES, unknown))
    with pytest.raises(library.Unavailable, match="structure Unknown is not there, 8 bytes here; reinstall"):
        library.load()


def test_every_structure_is_checked() -> None:
    """Those of the module are all in the list, and the sources tell the size of each."""
    ours = [one for one in vars(structures).values() if isinstance(one, type) and issubclass(one, ctypes.Structure)]
    assert set(structures.STRUCTURES) == {one for one in ours if one is not ctypes.Structure}
    sources = "".join(path.read_text(encoding="utf-8") for path in build.SOURCES.glob("*.cpp"))
    told = re.findall(r"^SR_SIZE_OF\((\w+)\)$", sources, re.MULTILINE)
    assert sorted(told) == sorted(one.__name__ for one in structures.STRUCTURES)


# ---- packages


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What packages are built from, without any objects; building writes there."""
    copied = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "objects", "demo")
    shutil.copytree(ROOT / "src", copied / "src", ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copied)
    return copied


def packages(tree: Path, target: str, out: Path, **environment: str) -> Path:
    """The package that hatchling builds."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out)]
    result = subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    (package,) = out.iterdir()
    return package


def test_sdist_carries_the_sources(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(packages(tree, "sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {file.name for file in (ROOT / PACKAGE).iterdir() if file.suffix in (".cpp", ".h", ".py")}
    assert {"hatch_build.py", *(f"{PACKAGE}/{name}" for name in sources)} <= names
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_wheel_carries_the_objects(tree: Path, tmp_path: Path) -> None:
    """For any Python 3 on this kind of machine; and they load where the wheel is unpacked."""
    if build.compiler() is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    command = " ".join(build.compiler() or [])
    # Quickly: the object that is called below without optimisation, the others of one function of the C library.
    other = tmp_path / "other.cpp"
    other.write_text("#include <stdlib.h>\n__attribute__((used)) static void* get(size_t n) { return malloc(n); }\n")
    script = f"""
        arguments="$*"
        case "$arguments" in
            *-DVL=4*) exec {command} "$@" -O0;;
            *-DVL=*) exec {command} ${{arguments% *}} {other};;
            *) exec {command} "$@";;
        esac"""
    quick = program(tmp_path / "quick", script)
    wheel = packages(tree, "wheel", tmp_path / "out", CXX=str(quick))
    kind = "manylinux_2_1[7-9]|manylinux_2_[2-9][0-9]" if build.platform.libc_ver()[0] == "glibc" else "linux"
    assert re.search(rf"-py3-none-({kind})_{build.platform.machine()}\.whl$", wheel.name)
    assert parse_wheel_filename(wheel.name)[3] <= set(sys_tags()), "pip would refuse it here"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "unpacked")
    expected = [f"{name}.so" for name in build.instruction_sets()] + [build.NOTE.name, build.DIGEST.name]
    assert {f"sparserefine/engines/cpu/native/objects/{name}" for name in expected} <= names
    code = (
        "import sparserefine, torch\n"
        "from sparserefine.engines.cpu.native.library import available\n"
        "from sparserefine.engines.cpu.kernels import kernels\n"
        "from sparserefine.sparse.epilogue import Epilogue\n"
        "kernel, x, y = kernels('generic'), torch.randn(7, 5), torch.empty(7, 3)\n"
        "weight = torch.randn(1, 5, 3)\n"
        "kernel.convolve(x, None, kernel.pack(weight), Epilogue(raw=y), 7)\n"
        "torch.testing.assert_close(y, x @ weight[0])\n"
        "print(sparserefine.__file__, available())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    environment = {name: value for name, value in environment.items() if name not in (library.CHOICE, library.FOLDER)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "unpacked"))
    assert "generic" in result.stdout


@pytest.mark.parametrize(
    ("environment", "why"),
    [({"CXX": "no-such-compiler"}, b"no C++ compiler"), ({build.PURE: "1"}, b"comes without compiled kernels")],
    ids=["no compiler", "on purpose"],
)
def test_wheel_without_kernels_is_for_any_machine(
    tree: Path, tmp_path: Path, environment: dict[str, str], why: bytes
) -> None:
    wheel = packages(tree, "wheel", tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        objects = [name for name in archive.namelist() if "/native/objects/" in name]
        assert [Path(name).name for name in objects] == [build.NOTE.name]
        assert why in archive.read(objects[0])


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_wheel_of_another_system_is_pure(tree: Path, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """The hook leaves hatchling's own tag alone, ``py3-none-any``: a tag for macOS has to name its version."""
    monkeypatch.syspath_prepend(str(tree))
    hook = importlib.import_module("hatch_build").KernelsHook
    told: list[str] = []
    here = SimpleNamespace(root=str(tree), app=SimpleNamespace(display_info=told.append))
    monkeypatch.setattr(sys, "platform", system)
    build_data: dict = {"artifacts": []}
    hook.initialize(here, "standard", build_data)
    assert set(build_data) == {"artifacts"}
    assert told == [f"CPU kernels: not built: the compiled kernels need Linux, this is {system}"]


@pytest.mark.slow
def test_both_wheels_run_in_environments_of_their_own(tmp_path: Path) -> None:
    """As ``make wheels``, with the dependencies of this environment instead of freshly installed ones."""
    if build.compiler() is None or build.platform.libc_ver()[0] != "glibc":
        pytest.skip("needs Linux with the GNU C library, and a C++ compiler")
    wheels.check(wheels.build(ROOT, tmp_path / "dist"), tmp_path)
