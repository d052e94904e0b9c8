"""Comparisons in regimes in which weight decay matters, made of many small runs each."""
