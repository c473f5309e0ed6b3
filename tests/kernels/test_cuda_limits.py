"""What the CUDA part says of sizes that it does not take. No GPU is needed for that."""

from ctypes import CDLL

import pytest

from qsharded_kernels import cuda, library


@pytest.mark.parametrize(
    ("function", "limits"),
    [
        ("nf4_quantize", ["2^37"]),
        ("nf4_linear", ["2^37", "in_features is at most 2^20", "2^31 - 1 tokens"]),
        ("nf4_dequantize", ["2^37", "16 bytes apart"]),
        ("nf4_dequantize_parts", ["1 to 4 weights", "2^37", "16 bytes apart"]),
    ],
)
def test_a_size_that_is_refused_is_told_with_every_limit_of_its_kernel(function: str, limits: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^{function}: sizes that its kernel does not take") as raised:
        cuda._raise_for(library.BAD_SIZE, function, CDLL(None))
    assert [limit for limit in limits if limit not in str(raised.value)] == []
