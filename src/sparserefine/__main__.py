"""``python -m sparserefine``."""

import sys

from sparserefine.cli import main

if __name__ == "__main__":
    sys.exit(main())
