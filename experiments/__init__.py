"""The paper's claims, tested on a model of 0.1 million parameters."""
