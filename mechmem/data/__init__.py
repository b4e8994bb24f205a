"""Data: examples, label noise and the tasks."""
