"""Kinds of models, one file each, with a function that loads it."""
