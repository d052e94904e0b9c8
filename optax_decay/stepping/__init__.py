"""Around an update: adding it to low-precision weights, or skipping it when a batch is broken."""
