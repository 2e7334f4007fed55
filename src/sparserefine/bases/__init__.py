"""Frozen bases: any segmentation model, wrapped to map images to coarse logits."""
