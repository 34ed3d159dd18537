"""Decide whether a response is right: compare its answer with the gold, or run its program."""
