"""Whether an error says that memory ran out. Imports nothing heavy."""

from __future__ import annotations

import errno
import re

_WORDS = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory of the machine or of a GPU ran out. PyTorch has an own class for the latter only."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Errors of values are this package's own; libraries that run a base have classes of their own.
    return not isinstance(error, ValueError) and _WORDS.search(str(error)) is not None
