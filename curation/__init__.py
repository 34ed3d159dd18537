"""Read problems from files and from the hub, and select those to train on (§2.1.1)."""
