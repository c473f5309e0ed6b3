"""The page on ``torch.ops.qsharded``: schemas from the registry, arguments, errors and examples from here."""

import torch

import qsharded.quant.ops  # noqa: F401 - registers them
from qsharded.quant.codebooks import CODEBOOKS
from qsharded.quant.formats import BLOCK_SIZES

_HEAD = """# `torch.ops.qsharded`

<!-- written by `make docs` -->

The operations behind the packed layer, for those who write layers of their own. `import qsharded.nn` registers them;
they trace under `torch.compile` and `torch.export`, run on any device, and are served by the kernels that
`QSHARDED_BACKEND` or the device chooses ([kernels.md](kernels.md)). In Python `qsharded.quant.ops` has the same with a
weight as one value, and `qsharded.nf4.quantize` makes such a weight from a matrix.

Axes: N = out_features, K = in_features, B = `block_size`, G = K/B blocks in a row; `...` are any leading axes.
"""

_PACKED = """| argument | dtype, shape | |
|---|---|---|
| `codes` | uint8 [N, K/2] | two codes to a byte, the first in the high nibble |
| `absmax` | uint8 [N, G] with double quantization, else fp32 [N, G] | rows may be strided |
| `absmax_scales` | fp32 [ceil(N*G/256)], or None | a scale for 256 absmax; None: no double quantization |
| `absmax_offset` | fp32, one element, or None | the mean of all absmax; None where `absmax_scales` is |
| `quant_type` | {types} | the codebook |
| `block_size` | {sizes} | B |

A `ValueError` says which of them does not fit: codes that are no uint8 matrix of whole blocks, another shape or dtype
of `absmax`, only one of `absmax_scales` and `absmax_offset` or one of another size, a format that there is not.
Operations do not look for NaN, which would wait for the device.
"""

_SETUP = """import torch
import qsharded.nn

torch.manual_seed(0)
N, K = 96, 256
weight = torch.randn(N, K, dtype=torch.bfloat16)
packed = qsharded.nf4.quantize(weight).packed.tensors  # codes, absmax, absmax_scales, absmax_offset
"""

# By operation: what it computes, its other arguments and results, its own errors, an example.
_OPERATIONS = {
    "nf4_quantize": (
        "Codes and absmax of a weight, before double quantization.",
        "`weight`: bf16, fp16 or fp32 [N, K]. Returns codes, uint8 [N, K/2], and absmax, fp32 [N, G] (formats from "
        "outside: as their scale encoding stores it). No gradient.",
        "`weight` of another dtype, no matrix, or with K no multiple of B. NaN and infinity show in absmax and are not "
        "refused; `qsharded.nf4.quantize` refuses them.",
        """codes, absmax = torch.ops.qsharded.nf4_quantize(weight)
assert (codes.shape, absmax.shape) == ((N, K // 2), (N, K // 64))
assert torch.equal(absmax, weight.float().unflatten(1, (-1, 64)).abs().amax(-1))
""",
    ),
    "nf4_dequantize": (
        "The weight: fp32 value * absmax, rounded once to `dtype`.",
        "`dtype`: bfloat16, float16, float32, or float64, which holds the fp32 values. Returns [N, K]. No gradient.",
        "another `dtype`.",
        """dense = torch.ops.qsharded.nf4_dequantize(*packed, torch.bfloat16)
assert (dense.dtype, dense.shape) == (torch.bfloat16, (N, K))
assert (dense - weight).abs().max() < 0.2 * weight.abs().max()
""",
    ),
    "nf4_linear": (
        "`x W^T + bias`. For few rows of x on GPUs the weight is decoded on its way to the tensor cores, and rounded "
        "in a way of its own, whose error is no larger; else it is dequantized first and freed after.",
        "`x`: bf16, fp16, fp32 or fp64 [..., K]; `bias`: x's dtype [N], or None. Returns [..., N] in x's dtype, under "
        "autocast too. Gradients flow to x and bias; the weight is dequantized again for them. The overload without a "
        "format is for NF4 in blocks of 64, `nf4_linear.kind` for all others.",
        "`x` of another dtype or whose last axis is not K; `bias` of another dtype or shape than x and N say.",
        """x = torch.randn(2, 5, K, dtype=torch.bfloat16, requires_grad=True)
y = torch.ops.qsharded.nf4_linear(x, *packed, None)
assert torch.equal(y, torch.nn.functional.linear(x, dense))
y.sum().backward()

fp4 = qsharded.nf4.quantize(weight, quant_type="fp4", block_size=128).packed.tensors
assert torch.ops.qsharded.nf4_linear.kind(x, *fp4, None, "fp4", 128).shape == (2, 5, N)
""",
    ),
    "nf4_linear_input_grad": (
        "`grad W`, the gradient of `nf4_linear` with respect to x.",
        "`grad`: bf16, fp16, fp32 or fp64 [..., N]. Returns [..., K] in grad's dtype. Gradients flow to grad.",
        "`grad` of another dtype or whose last axis is not N.",
        """grad = torch.ones(2, 5, N, dtype=torch.bfloat16)
assert torch.equal(torch.ops.qsharded.nf4_linear_input_grad(grad, *packed), x.grad)
""",
    ),
}


def page() -> str:
    """docs/operations.md.

    Raises:
        ValueError: an operation is registered that the page does not know, or is no more.
    """
    registered = {schema.partition("(")[0].partition(".")[0] for schema in schemas()}
    if registered != set(_OPERATIONS):
        raise ValueError(f"registered: {sorted(registered)}; described in {__file__}: {sorted(_OPERATIONS)}")
    types = ", ".join(f'"{name}"' for name in CODEBOOKS)
    weight = _PACKED.format(types=types, sizes=", ".join(map(str, BLOCK_SIZES)))
    shared = f"\n## The weight\n\n{weight}\nThe examples below go on from\n\n{_code(_SETUP)}"
    return _HEAD + shared + "".join(_section(name) for name in _OPERATIONS)


def schemas() -> list[str]:
    """Those registered, overloads one by one, without their namespace."""
    namespace = "qsharded::"
    every = [str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(namespace)]
    return sorted(schema.removeprefix(namespace) for schema in every)


def _section(name: str) -> str:
    what, arguments, errors, example = _OPERATIONS[name]
    own = "\n".join(schema for schema in schemas() if schema.partition("(")[0].partition(".")[0] == name)
    return (
        f"\n## {name}\n\n{what}\n\n```\n{own}\n```\n\n{arguments}\n\n"
        f"ValueError: as above, and {errors}\n\n{_code(example)}"
    )


def _code(text: str) -> str:
    return f"```python\n{text}```\n"
