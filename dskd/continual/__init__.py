"""What a sequence of tasks keeps of the earlier ones, so as not to unlearn them."""
