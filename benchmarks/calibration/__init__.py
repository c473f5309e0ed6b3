"""What calibration is worth on a real model, and what it takes of a GPU at the size of large ones."""
