"""Batches that are a pure function of (seed, step), from text, token stores and images."""
