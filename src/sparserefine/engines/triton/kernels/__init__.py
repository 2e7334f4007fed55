"""What runs on the GPU; the modules beside this package launch it."""
