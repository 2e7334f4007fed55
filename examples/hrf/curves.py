"""Prints the validation curves of runs as Markdown rows: ``python examples/hrf/curves.py runs/hrf``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hrf")
    for file in sorted([*root.glob("*/curve.jsonl"), *root.glob("*/log.jsonl")]):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        key = "val" if file.name == "curve.jsonl" else "val_refined"
        points = ", ".join(f"{line['step']}: {line[key]:.4f}" for line in lines)
        print(f"| {file.parent.name} | {points} |")


if __name__ == "__main__":
    main()
