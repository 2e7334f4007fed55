"""Nothing to collect: what runs here runs in an environment of its own, see ``make parity``."""

collect_ignore_glob = ["*.py"]
