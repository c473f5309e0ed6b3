"""bitsandbytes: its 4-bit models made ours in place and back, and our kernels behind its operations.

convert_bitsandbytes(model)  # every Linear4bit becomes a PackedLinear that shares its bytes
to_bitsandbytes(model)  # and back

install()  # bitsandbytes' own layers and functions run on our kernels, until uninstall()

"""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, _convert_weight_packed_for_cpu_inverse
from torch import Tensor, nn

from qsharded.integrations.bitsandbytes_format import check_map, quant_format_of, rows_as_parameters
from qsharded.integrations.bitsandbytes_kernels import install as install
from qsharded.integrations.bitsandbytes_kernels import uninstall as uninstall
from qsharded.quant import blockwise8, formats
from qsharded.quant.linear import PackedLinear


def convert_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every ``bitsandbytes.nn.Linear4bit`` of ``model`` by a PackedLinear with its bytes, in place.

    The bytes are shared, but for the scales of rows with an odd number of blocks, which are padded. A layer then
    computes in the dtype of its input; bitsandbytes' compute_dtype is given up.

    Raises:
        ValueError: the model has no such layer, or one that is not quantized yet, or whose in_features is no multiple
            of its block size. The model is then as it was.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    if not layers:
        raise ValueError("the model has no layer of bitsandbytes in 4 bits")
    converted = [(name, _ours(layer, name)) for name, layer in layers]
    for name, layer in converted:
        model.set_submodule(name, layer)
    return model


def _ours(layer: Any, name: str) -> PackedLinear:
    codes, state = _plain_order(layer, name)
    nested = state.state2 if state.nested else None
    quant_format = quant_format_of(state.quant_type, state.blocksize, nested.blocksize if nested else None, name)
    check_map(state.code, formats.codebook("cpu", quant_format.quant_type), name)
    if nested is not None:
        check_map(nested.code, blockwise8.dynamic_map(True, "cpu"), name)
    rows = rows_as_parameters(codes, state.absmax, state.shape, quant_format, name)
    new = PackedLinear(
        layer.in_features,
        layer.out_features,
        False,
        quant_type=quant_format.quant_type,
        block_size=quant_format.block_size,
        double_quant=state.nested,
        device="meta",
    )
    new.weight, new.weight_absmax = (nn.Parameter(tensor, requires_grad=False) for tensor in rows)
    if nested is not None:
        new.weight_absmax_scales, new.weight_absmax_offset = nested.absmax.float(), state.offset.float()
    new.bias = layer.bias
    return new.train(layer.training)


def _plain_order(layer: Any, name: str) -> tuple[Tensor, Any]:
    """Codes and state of a layer. On CPUs with AVX-512 bitsandbytes reorders them at the first inference and rounds
    the absmax to bf16; the layer then is taken as bitsandbytes would save it, its offset in bf16 too."""
    weight = layer.weight
    state = weight.quant_state or layer.quant_state
    if state is None:
        raise ValueError(f"{name} is not quantized yet: bitsandbytes does that when the model moves to a device")
    if getattr(state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)
        if not state.nested:  # which the inverse leaves as they are for the kernel: transposed, in bf16
            state.absmax = state.absmax.T.float().reshape(-1)
        return weight.data, weight.quant_state
    return weight.data, state


def to_bitsandbytes(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Replace every PackedLinear of ``model`` by a ``bitsandbytes.nn.Linear4bit`` with its bytes, in place.

    Args:
        model: whole, not sharded.
        dtype: what the layers compute in, and what bitsandbytes dequantizes to.

    Raises:
        ValueError: the model has no PackedLinear.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    if not layers:
        raise ValueError("the model has no PackedLinear layer")
    for name, layer in layers:
        model.set_submodule(name, _theirs(layer, dtype))
    return model


def _theirs(layer: PackedLinear, dtype: torch.dtype) -> Any:
    packed = layer.packed()
    scales, quant_type = packed.absmax_scales, layer.quant_type
    nested = scales is not None
    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, False, dtype, nested, quant_type, device="meta")
    new.quant_state = QuantState(
        absmax=packed.absmax.flatten(),
        shape=torch.Size([layer.out_features, layer.in_features]),
        code=formats.codebook(packed.device, quant_type).clone(),
        blocksize=layer.block_size,
        quant_type=quant_type,
        dtype=dtype,
        offset=packed.absmax_offset,
        state2=_second_level(scales) if scales is not None else None,
    )
    new.weight = bnb.nn.Params4bit(
        packed.codes.detach().view(-1, 1),
        quant_state=new.quant_state,
        blocksize=layer.block_size,
        compress_statistics=nested,
        quant_type=quant_type,
        module=new,
        bnb_quantized=True,
    )
    new.register_parameter("bias", layer.bias)
    return new.train(layer.training)


def _second_level(scales: Tensor) -> Any:
    code = blockwise8.dynamic_map(True, scales.device).clone()
    return QuantState(absmax=scales, code=code, blocksize=blockwise8.BLOCK, dtype=torch.float32)
