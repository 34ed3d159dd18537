"""The paper's claims put to a model of 0.1 million parameters."""
