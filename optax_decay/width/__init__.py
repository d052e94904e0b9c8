"""How learning rate and decay follow the width of a model."""
