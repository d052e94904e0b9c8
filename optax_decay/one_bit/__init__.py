"""1-bit Adam: workers that exchange momenta as signs, and the state that this takes."""
