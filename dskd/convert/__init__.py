"""Checkpoints of the original systems as HuggingFace folders (``dskd convert``)."""
