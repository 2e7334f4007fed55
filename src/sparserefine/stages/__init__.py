"""The stages after the base: selector, extractor, ensembler."""
