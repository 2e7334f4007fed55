"""Training a refiner: configuration, coarse logits, losses, the loop."""
