"""Images, datasets, augmentation and stored coarse logits."""
