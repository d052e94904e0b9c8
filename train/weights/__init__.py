"""Trained weights outside of a run: exported, imported, sampled from."""
