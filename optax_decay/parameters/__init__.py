"""What a parameter is: its path, the meaning of its axes, where it lives, and checks of arguments."""
