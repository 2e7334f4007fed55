"""``python -m sparserefine``."""

import sys

from sparserefine.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
