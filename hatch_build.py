"""Compiles the CPU kernels when the package is built: into wheels, or beside the sources of editable installs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "src/sparserefine/engines/cpu/native"


class KernelsHook(BuildHookInterface):
    """Builds the CPU kernels into the package, if it can.

    A wheel with kernels is for Linux, one processor architecture and any Python 3. A wheel without them is for any
    machine; it is built on other systems, without a C++ compiler, or with ``SPARSEREFINE_PURE=1`` in the environment.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the kernels and sets the wheel's tag; hatch calls it for wheels and editable installs."""
        spec = importlib.util.spec_from_file_location("build_kernels", Path(self.root, PACKAGE, "build.py"))
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        built = build.build()
        self.app.display_info(f"CPU kernels: {build.NOTE.read_text(encoding='utf-8').strip()}")
        build_data["artifacts"].append(f"{PACKAGE}/objects/*")
        if built:
            build_data["pure_python"] = False
            build_data["tag"] = build.wheel_tag()
