"""One training step: optimizer, task, sharding over devices, and what is observed of the weights."""
