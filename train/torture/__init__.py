"""What a run survives, measured."""
