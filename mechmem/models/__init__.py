"""Models: architectures, sites, and how a model is run."""
