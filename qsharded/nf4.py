"""The public quantizer: a matrix to NF4 and back. The format itself is :mod:`qsharded.quant.formats`."""

from qsharded.quant.formats import NF4Weight, quantize

__all__ = ["NF4Weight", "quantize"]
