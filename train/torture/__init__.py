"""Reliability tests: real runs under kills, signals, damage and changed devices, compared with undisturbed ones."""
