"""The reasoning tasks: one file each."""
