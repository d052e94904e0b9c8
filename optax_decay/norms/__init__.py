"""Links about the norms of matrices: hyperball and radial brake on the finished step, relative updates before it."""
