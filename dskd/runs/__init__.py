"""Recipes carried out: plan, stages, context and report."""
