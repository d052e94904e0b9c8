"""The life of one run on disk: folder, checkpoints, records, pictures, and signals."""
