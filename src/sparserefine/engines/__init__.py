"""What executes the sparse network: the reference defines results, the others are only faster."""
