"""The start-up probe: does this build of PyTorch bring packed bytes through the gather as they were?"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsharded.distributed import fsdp
from qsharded.distributed.exact_all_gather import DamagedGather
from qsharded.distributed.world import World
from qsharded.utils import collectives

# Every bf16 pattern once: what any two bytes of packed weights can look like.
_WORDS_RC = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(1024, 128)


def check_gather(world: World) -> None:
    """Bring all 65,536 bf16 patterns through :func:`parallel.shard` and its gather; every rank calls this.

    Raises:
        parallel.DamagedGather: on every rank, where a byte differed on any.
    """
    if world.mesh is None:
        return  # nothing is gathered
    # As models of the two dtypes are sharded; fp32 beside bytes without a policy would be gathered as uint8, unharmed.
    dtypes = ((None, torch.bfloat16), (torch.bfloat16, torch.float32))
    changed = sum(changed_bytes(world, param_dtype, adapter_dtype) for param_dtype, adapter_dtype in dtypes)
    total = collectives.all_reduce(torch.tensor(changed, device=world.device), dist.ReduceOp.SUM, world.group)
    if total.item():
        raise DamagedGather(
            f"PyTorch {torch.__version__} changed {total.item()} bytes of the probe that was gathered over "
            f"{world.size} ranks on {world.device.type}: packed weights would be damaged. Use a PyTorch version that "
            "qsharded supports, and report this one; python -m qsharded.doctor checks again"
        )


def changed_bytes(world: World, param_dtype: torch.dtype | None, adapter_dtype: torch.dtype) -> int:
    """How many of the probe's 131,072 bytes a forward of this rank sees changed."""
    probe = _Probe(world.device, adapter_dtype)
    fsdp.shard(probe, world.mesh, param_dtype=param_dtype)
    with torch.no_grad():
        # With an input, as every model has one: on CUDA, FSDP2 up to torch 2.11 fails for a root without any.
        return int(probe(_WORDS_RC.to(world.device)))


class _Packed(nn.Module):
    """A layer as training has them: frozen bytes seen as bf16, and a trainable parameter."""

    def __init__(self, device: torch.device, adapter_dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = nn.Parameter(_WORDS_RC.to(device, copy=True).view(torch.bfloat16), requires_grad=False)
        self.adapter = nn.Parameter(torch.zeros(8, 8, dtype=adapter_dtype, device=device))

    def forward(self, expected_RC: Tensor) -> Tensor:
        return (self.packed.view(torch.uint8) != expected_RC).sum()


class _Probe(nn.Module):
    """The names under which :func:`parallel.shard` looks for what it groups."""

    def __init__(self, device: torch.device, adapter_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(8, 8, device=device)
        self.model.layers = nn.ModuleList([_Packed(device, adapter_dtype)])
        self.lm_head = nn.Linear(8, 8, bias=False, device=device)

    def forward(self, expected_RC: Tensor) -> Tensor:
        """How many of the bytes that the layer sees are others than ``expected_RC``."""
        return self.model.get_submodule("layers.0")(expected_RC)
