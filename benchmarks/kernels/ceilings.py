"""What this machine can do at best, measured in the same run: copying and multiplying."""

from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import in_turns

_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """``copy``: bytes read plus bytes written a second; ``matmul``: bf16 floating-point operations a second."""

    copy: float
    matmul: float

    def limit(self, bytes_moved: int, flops: int) -> float:
        """The microseconds that so much traffic or arithmetic takes, whichever is longer."""
        return max(bytes_moved / self.copy, flops / self.matmul) * 1e6


def measure(device: torch.device, repeats: int) -> Ceilings:
    """A copy of 1 GiB and an 8192^3 matmul, in turns; less on a CPU."""
    source = torch.randn(_COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = _MATMUL_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    times = in_turns({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b.T}, device, repeats)
    return Ceilings(2 * source.nbytes / times["copy"].median * 1e6, 2 * size**3 / times["matmul"].median * 1e6)
