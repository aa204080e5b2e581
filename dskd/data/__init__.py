"""Text to rows: sources, tokenizers, packing, prepared folders, masking and the loader."""
