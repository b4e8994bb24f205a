"""The figures: one file each, from a saved table to a plotly figure; nothing here runs a model."""
