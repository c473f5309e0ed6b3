"""The Triton kernels against the reference, bit for bit; interpreted where there is no GPU."""

import pytest
import torch

from qsharded_kernels import triton_nf4
from tests.kernels.nf4_suite import NF4Suite

# numpy, which interprets the kernels, warns of the overflows and NaN that some cases hold
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class TestTritonNF4(NF4Suite):
    kernels, device = triton_nf4, "cuda" if torch.cuda.is_available() else "cpu"
