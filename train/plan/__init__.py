"""The cost of a run, read from shapes and compiled programs before any of it runs."""
