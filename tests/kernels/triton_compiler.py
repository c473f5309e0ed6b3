"""``python -m tests.kernels.triton_compiler 80 90``: the products in Triton, compiled for GPUs that are not here.

Their callers run, and nothing is launched. Prints a line of JSON for each kernel. A process of its own, for Triton
interprets in that of the tests.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qsharded.quant import own_kernels
from qsharded.quant.experts import PackedExperts
from qsharded.quant.pieces import Pieces
from qsharded_kernels import triton_experts, triton_grouped_update, triton_merge, triton_mirror, triton_route
from tests.kernels.packed_products import packed

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main(architectures: list[int]) -> None:
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        print(json.dumps({"capability": capability, "name": kernel.metadata.name, "rows": M} | report(kernel)))
        return kernel

    JITFunction.run = compile_only
    weights = [packed(320, 1024), packed(70, 320, double_quant=False)]  # whole turns, and not
    for capability in architectures:
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda target=target: target,
                get_current_device=lambda capability=capability: capability,
                get_current_stream=lambda device: 0,
            )
        )
        for M, weight in product((1, 16), weights):
            x = torch.empty(M, weight.shape[1], dtype=torch.bfloat16)
            own_kernels.triton_linear(x, weight, None, splits=2)
        experts = PackedExperts(3, 1024, 320).packed()
        x = torch.empty(9, 1024, dtype=torch.bfloat16)
        pieces = Pieces.of([(0, 1), (2, 8)], x.device)
        own_kernels.triton_grouped_linear(x, experts.tensors, experts.quant_format, pieces)
        M, grad = 8, torch.empty(8, 320, dtype=torch.bfloat16)
        own_kernels.triton_input_grad(grad, weights[0], splits=2)
        _of_experts()
        _of_windows()


def _of_experts() -> None:
    chosen = torch.zeros(9 * 8, dtype=torch.int64)
    position = triton_route.route(chosen, 128, 8).position_P.view(9, 8)
    gate, scores = torch.empty(72, 768, dtype=torch.bfloat16), torch.empty(9, 8)
    triton_experts.combine(triton_experts.swiglu(gate, gate), position, scores)
    triton_experts.swiglu_backward(gate, gate, gate, scores.flatten())
    narrow, ends = torch.empty(72, 16, dtype=torch.bfloat16), torch.zeros(128, dtype=torch.int32)
    triton_grouped_update.add_(gate, narrow, torch.empty(128, 16, 768, dtype=torch.bfloat16), ends)


def _of_windows() -> None:
    chunks, log_sums = torch.empty(4, 8, 32, 128, dtype=torch.bfloat16), torch.empty(4, 32, 8)
    mirrored = triton_mirror.mirrored(chunks, 2, 1)
    triton_mirror.add_mirrored_(chunks, mirrored, 2, 1)
    triton_merge.merge_(chunks, log_sums, mirrored, log_sums[:2], 2)


def report(kernel: Any) -> dict[str, int]:
    """Shared memory, registers and spilled bytes of a thread, byte permutations."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "shared": kernel.metadata.shared,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "permutations": kernel.asm["ptx"].count("prmt.b32"),
    }


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]])
