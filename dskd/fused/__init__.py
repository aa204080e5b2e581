"""Fused losses: one implementation for CUDA (Triton kernels), one for every other device."""
