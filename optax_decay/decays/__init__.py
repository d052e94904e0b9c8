"""The decays of the literature, one paper a file; each is an instance of the product in `optax_decay.product`."""
