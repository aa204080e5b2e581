"""Row-keyed files: one format, one way to fill them, one reader a kind."""
