"""Which units of a teacher go, when, and how their compactors become exactly zero."""
