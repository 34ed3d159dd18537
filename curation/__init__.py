"""Problems from files and from the hub, and the passes that make a training set of them (§2.1.1)."""
