"""Tasks that models are fine-tuned for: how well one is done."""
