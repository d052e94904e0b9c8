"""What a run would cost, read from compiled programs before any of it runs."""
