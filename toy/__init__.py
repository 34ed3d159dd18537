"""The embedded task and its base model of 0.1 million parameters."""
