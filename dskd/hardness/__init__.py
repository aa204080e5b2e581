"""Which tokens a model finds hard, and what is done with that (Self-Evolution)."""
