"""The session: models and example sets, and everything that may be asked of them."""
