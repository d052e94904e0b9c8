"""Tuned points by text and arm, (learning rate, weight decay): where `compare cpu` ended its searches."""

POINTS: dict[str, dict[str, tuple[float, float]]] = {
    "stdlib": {
        "adamw": (0.008, 0.0),
        "muon": (0.016, 0.5),
        "huber": (0.008, 0.0),
        "conda": (0.032, 0.0),
        "root": (0.032, 0.5),
    },
    "zipf": {
        "adamw": (0.008, 2.0),
        "muon": (0.016, 2.0),
        "huber": (0.004, 2.0),
        "conda": (0.016, 2.0),
        "root": (0.008, 2.0),
    },
}
