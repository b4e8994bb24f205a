"""Training: recipes, the loop and the store of trained models."""
