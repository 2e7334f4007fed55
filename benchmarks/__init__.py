"""Timings of the parts that decide the speed. Run by hand, on an idle machine: see README.md."""
