"""A model made narrower while it trains or at once (Weight-Inherited Distillation)."""
