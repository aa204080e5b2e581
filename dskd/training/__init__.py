"""The step loop, the wrapped objective, the learning rate and the evaluation."""
