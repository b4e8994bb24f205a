"""The function of single MLP neurons."""
