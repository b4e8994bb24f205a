"""Plants: one file for each way to build a memory whose place is known."""
