"""Architectures: one file each, found by its file name. `base.py` is the contract."""
