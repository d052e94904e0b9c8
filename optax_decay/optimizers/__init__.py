"""Optimizers around the decays, one paper a file, and the numerics that only they use."""
