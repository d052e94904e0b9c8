"""AlphaDecay: decay multipliers from the spectrum of each weight matrix."""
