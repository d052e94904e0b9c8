"""Benchmarks: the time, memory and precision of the library and of the training step."""
