"""Replacing convolutions of a network: which ones, by what, with which weights, and what each layer loses."""
