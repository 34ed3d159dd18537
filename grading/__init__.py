"""Is a response right? Extract its answer and compare it with the gold one, or run its program."""
