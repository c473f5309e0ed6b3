"""Codes and scales chosen for the inputs that a layer sees, in the bytes that rounding to nearest takes."""
