"""Synthetic tasks, as endless batches for the training loop."""
