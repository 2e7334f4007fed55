"""Images on disk, with labels or without, and training crops of them."""
