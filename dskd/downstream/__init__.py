"""What exported models are worth: minimal pairs, and fine-tuning on tasks over grids."""
