"""Model families, one file each, with its loader."""
