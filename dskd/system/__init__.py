"""Files, ranks, locks, log and device of a process: nothing here knows of models or data."""
