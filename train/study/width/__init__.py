"""Where the best learning rate and decay are at several widths."""
