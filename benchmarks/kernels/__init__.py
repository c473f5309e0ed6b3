"""Kernel benchmarks: ``python -m benchmarks.kernels``. A file an operation, in ``ops/``."""
