"""Matrices as devices see them: gathered whole, stacked by shape, orthogonalised, and their largest singular value."""
