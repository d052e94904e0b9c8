"""Finds learning rate and weight decay for a text, an optimizer and a decay, with many runs of a small model."""
