"""The mathematics: one file per op, each with a step, a reference, a parallel form and a table of implementations."""
