"""``python -m sparserefine``."""

import os
import sys

if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first: a `queue.py` there would run in place of Python's.
    # Before these lines only what Python itself loads first is imported: `os`, `sys`.
    unsafe = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
    try:
        here = os.getcwd()  # noqa: PTH109 (pathlib is not loaded yet)
    except OSError:  # the current folder was deleted
        here = ""
    if unsafe and sys.path[0] in ("", here):
        folder = sys.path.pop(0)

        from pathlib import Path

        if Path(__file__).parents[1] == Path(folder):  # a checkout: still needed, but last
            sys.path.append(folder)

    from sparserefine.commands.main import main

    sys.exit(main())
