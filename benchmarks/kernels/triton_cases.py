"""The products in Triton with given tiles, as contenders beside bf16, decoding first, our CUDA kernel and others."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.kernels import peers
from benchmarks.kernels.case import Case, Contender
from benchmarks.kernels.context import Packed
from qsharded.quant import backends, own_kernels
from qsharded_kernels import cuda
from qsharded_kernels.triton_tiles import InputGradTile, LinearTile

BF16, DEQUANTIZED, COMPILED = "bf16", "dequantized", "compiled"
TOLERANCE = 5e-3  # the weight and the output are rounded to bf16 once each

Tile = LinearTile | InputGradTile
MakeCase = Callable[[Packed, int, list[Tile], list[peers.Peer]], Case]


def tile_name(tile: Tile) -> str:
    """Such as "permute 64 rows 4 warps 2 stages 8 programs"."""
    what = tile.decoder if isinstance(tile, LinearTile) else f"grad {tile.blocks} blocks"
    return f"{what} {tile.rows} rows {tile.warps} warps {tile.stages} stages {tile.programs_per_sm} programs"


def linear_case(packed: Packed, M: int, tiles: list[Tile], found: list[peers.Peer]) -> Case:
    """x W^T of ``M`` random rows."""
    dequantized = packed.dequantized()
    bf16_weight = dequantized.bfloat16()
    x = torch.randn(M, packed.shape[1], device=packed.codes.device).bfloat16()
    run = partial(own_kernels.triton_linear, x, packed.packed(), None)
    contenders = [
        *_of_tiles(run, tiles),
        Contender(BF16, partial(F.linear, x, bf16_weight), TOLERANCE),
        Contender(DEQUANTIZED, lambda: F.linear(x, _dequantize(packed)), TOLERANCE),
        *(Contender(peer.name, _of_peer(peer, x, packed.weight), peers.TOLERANCE) for peer in found),
    ]
    if cuda.is_available(x.device):
        compiled = partial(own_kernels.CompiledCuda().linear, x, packed.packed(), None)
        contenders.append(Contender(COMPILED, compiled, TOLERANCE))
    return packed.product("linear", x.double() @ dequantized.T, contenders, BF16)


def input_grad_case(packed: Packed, M: int, tiles: list[Tile], found: list[peers.Peer]) -> Case:
    """dy W of ``M`` random rows."""
    dequantized = packed.dequantized()
    bf16_weight = dequantized.bfloat16()
    grad = torch.randn(M, packed.shape[0], device=packed.codes.device).bfloat16()
    contenders = [
        *_of_tiles(partial(own_kernels.triton_input_grad, grad, packed.packed()), tiles),
        Contender(BF16, partial(torch.matmul, grad, bf16_weight), TOLERANCE),
        Contender(DEQUANTIZED, lambda: grad @ _dequantize(packed), TOLERANCE),
    ]
    return packed.product("input_grad", grad.double() @ dequantized, contenders, BF16)


def _dequantize(packed: Packed) -> Tensor:
    return backends.dequantize(packed.packed(), torch.bfloat16)


def _of_peer(peer: peers.Peer, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return partial(peer.linear, x, peer.quantize(weight))


def _of_tiles(run: Callable[..., Tensor], tiles: list[Tile]) -> list[Contender]:
    """But for those that ask for more shared memory than this card has."""
    return [Contender(tile_name(tile), partial(run, tile=tile), TOLERANCE) for tile in tiles if _fits(run, tile)]


def _fits(run: Callable[..., Tensor], tile: Tile) -> bool:
    try:
        run(tile=tile)
    except OutOfResources as error:
        print(f"{tile_name(tile)} is left out: {error}")
        return False
    return True
