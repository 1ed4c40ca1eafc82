"""Training: data, optimiser, loop, and the job that `everlong train` runs."""
