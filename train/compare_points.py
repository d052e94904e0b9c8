"""Tuned points by text and arm, (learning rate, weight decay): where `compare cpu` ended its searches."""

POINTS: dict[str, dict[str, tuple[float, float]]] = {
    "stdlib": {
        "adamw": (0.008, 0.0),
        "muon": (0.016, 0.5),
        "huber": (0.008, 0.0),
        "alphadecay_matched": (0.008, 0.5),
        "alphadecay": (0.008, 0.5),
        "conda": (0.032, 0.0),
        "root": (0.032, 0.5),
        "sophia": (0.002, 0.0),
        "exadam": (0.004, 0.5),
        "one_bit_adam": (0.008, 0.5),
    },
    "zipf": {
        "adamw": (0.008, 2.0),
        "muon": (0.016, 2.0),
        "huber": (0.004, 2.0),
        "alphadecay_matched": (0.008, 0.0),
        "alphadecay": (0.016, 2.0),
        "conda": (0.016, 2.0),
        "root": (0.008, 2.0),
        "sophia": (0.001, 0.0),
        "exadam": (0.002, 2.0),
        "one_bit_adam": (0.008, 2.0),
    },
}
