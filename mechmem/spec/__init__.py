"""Specs: components and their registries, sweeps, YAML files, errors."""
