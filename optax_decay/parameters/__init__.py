"""Descriptions of parameters: paths, the meaning of axes, placement on devices; and checks of arguments."""
