"""Kernels of the NF4 format: Triton, and the loader of the compiled library. They receive every table they use."""
