"""Attacks on the product: kills, full disks, two runs at once (``kills``), and bad files (``fuzz``)."""
