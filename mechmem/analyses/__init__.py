"""The analyses: one file each, in families by what they ask."""
