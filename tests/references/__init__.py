"""Reference implementations in float64 NumPy, written from the equations."""
