"""Images, labels and coarse logits as tensors: no files, no models."""
