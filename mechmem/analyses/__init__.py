"""The analyses: one file each, grouped by the kind of question."""
