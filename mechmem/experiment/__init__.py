"""Experiments: the spec of a run, its cells, claims and results."""
