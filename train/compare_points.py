"""Tuned points by text and arm, (learning rate, weight decay): where `compare cpu` ended its searches."""

POINTS: dict[str, dict[str, tuple[float, float]]] = {}
