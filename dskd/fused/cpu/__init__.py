"""The fused losses in closed forms of plain torch, for machines without Triton."""
