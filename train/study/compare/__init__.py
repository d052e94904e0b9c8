"""Which decay or optimizer is faster than AdamW, by how much, and whether the evidence suffices."""
