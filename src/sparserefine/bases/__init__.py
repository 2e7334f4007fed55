"""Frozen bases: any model as one thing that maps images to coarse logits."""
