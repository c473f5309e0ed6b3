"""Write nf4.safetensors, what bitsandbytes 0.50.2 makes of chosen weights on the CPU. Run it as a script.

The inputs are in the file too: a random generator's stream may change from one PyTorch to the next.
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from torch import Tensor

VERSION = "0.50.2"
BLOCK = 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def hard_rows(dtype: torch.dtype) -> Tensor:
    """[N, 64], one difficulty a row: zeros of both signs, ties and their neighbours, subnormal and huge blocks."""
    codebook = functional.get_4bit_type("nf4", device="cpu")
    ties = torch.cat([torch.ones(1), (codebook[:-1] + codebook[1:]) / 2, torch.zeros(48)])
    ramp = torch.linspace(-1, 1, BLOCK)
    finfo = torch.finfo(dtype)
    rows = [
        torch.zeros(BLOCK),
        -torch.zeros(BLOCK),
        ties,
        -ties,
        torch.nextafter(ties, torch.tensor(2.0)).clamp(max=1),
        torch.nextafter(ties, torch.tensor(-2.0)),
        ties * 2.0**-10,
        ramp * finfo.smallest_normal,
        torch.arange(-32, 32) * finfo.smallest_normal * finfo.eps,  # the smallest subnormals
        ramp * 1.2e-38,  # about where the divisor stops following absmax
        ramp * 0.9e-38,
        ramp * finfo.max,
        torch.cat([torch.tensor([finfo.max]), ramp[1:]]),
        torch.full((BLOCK,), -finfo.max),
    ]
    return torch.stack(rows).to(dtype)


def quantized(weight: Tensor, quant_type: str = "nf4", block_size: int = BLOCK) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    return codes.view(weight.shape[0], -1), state.absmax.view(weight.shape[0], -1)


def weights(tensors: dict[str, Tensor]) -> None:
    random = torch.randn(5, 9 * BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, dtype in DTYPES.items():
        for kind, weight in (("random", random.to(dtype)), ("hard", hard_rows(dtype))):
            codes, absmax = quantized(weight)
            tensors |= {f"{kind}.{name}.weight": weight, f"{kind}.{name}.codes": codes, f"{kind}.{name}.absmax": absmax}


def other_kinds(tensors: dict[str, Tensor]) -> None:
    """Random rows, zeros, and values just on either side of 0, which FP4 gives two codes."""
    for quant_type, block_size in (("fp4", 64), ("fp4", 32), ("nf4", 128)):
        weight = torch.randn(4, 2 * block_size, generator=torch.Generator().manual_seed(block_size))
        weight[0, :block_size] = 0
        weight[1, 1:5] = torch.tensor([1e-9, -1e-9, 0.0, -0.0])
        codes, absmax = quantized(weight, quant_type, block_size)
        tensors |= {
            f"{quant_type}.{block_size}.{part}": t
            for part, t in (("weight", weight), ("codes", codes), ("absmax", absmax))
        }


def dequantizing(tensors: dict[str, Tensor]) -> None:
    """Every byte under eight absmax a row; a byte pairs each value with each.

    None dequantizes to subnormals: on CPUs with bf16 instructions bitsandbytes makes those 0.
    """
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    absmax = torch.tensor(
        [[0, 1, 0.1, 3.3, 0.0123, 1e-3, 250.5, 0.7], [1e-36, 1e-4, 1e-6, 6e4, 1e5, -0.01, 1e30, 3e38]]
    )
    tensors |= {"dequantize.codes": codes, "dequantize.absmax": absmax}
    for name, dtype in DTYPES.items():
        tensors[f"dequantize.{name}"] = torch.ops.bitsandbytes.dequantize_4bit(
            codes, absmax.flatten(), BLOCK, "nf4", [2, 512], dtype
        )


def double_quantization(tensors: dict[str, Tensor]) -> None:
    """131 rows of 9 blocks: 4 full second-level blocks and a part of one."""
    weight = torch.randn(131, 9 * BLOCK, generator=torch.Generator().manual_seed(1)) * 0.02
    _, absmax = quantized(weight)
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    tensors |= {"double.absmax": absmax, "double.codes": codes, "double.scales": state.absmax, "double.offset": offset}


def main() -> None:
    assert bitsandbytes.__version__ == VERSION, bitsandbytes.__version__
    torch.set_num_threads(1)  # bitsandbytes' offset is an fp32 mean, whose order of summation the threads change
    tensors = {
        "codebook": functional.get_4bit_type("nf4", device="cpu"),
        "codebook.fp4": functional.get_4bit_type("fp4", device="cpu"),
        "map.signed": functional.create_dynamic_map(signed=True),
        "map.unsigned": functional.create_dynamic_map(signed=False),
    }
    weights(tensors)
    other_kinds(tensors)
    dequantizing(tensors)
    double_quantization(tensors)
    path = Path(__file__).with_name("nf4.safetensors")
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"bitsandbytes": VERSION})


if __name__ == "__main__":
    main()
