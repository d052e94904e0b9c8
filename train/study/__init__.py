"""Experiments that are made of many runs."""
