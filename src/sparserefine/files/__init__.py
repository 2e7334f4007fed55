"""Reading and writing images, labels and settings; files are either whole or absent."""
