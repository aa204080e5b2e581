"""Tests of minimal pairs, and of grids of fine-tuning."""
