"""What a run is: its fields with units and checks, and named experiments."""
