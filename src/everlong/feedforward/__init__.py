"""Feed-forward blocks: one file each, found by its name, under the laws of the mixers."""
