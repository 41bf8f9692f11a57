"""Measuring: what a convolution must cost (counts) and what it does cost (timing, memory, ceilings)."""
