"""Information that can be read from activations."""
