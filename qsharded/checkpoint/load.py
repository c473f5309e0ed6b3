"""Build a model and fill it: meta init, quantize, adapt, shard, then each rank reads its own rows and packs them."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qsharded import nf4, ops, parallel
from qsharded.autograd.recompute import Mode
from qsharded.checkpoint.source import RandomWeights, SafetensorsFolder, WeightSource, find_checkpoint, read_json
from qsharded.layout import SHARDED, Layout, lay_out
from qsharded.models import CausalLM, ModelConfig
from qsharded.nn import LoRAConfig, LoRALinear, NF4Linear, add_lora, quantize_
from qsharded.nn.lora import initial_A
from qsharded.nn.nf4_linear import pad_absmax


def load_model(
    path_or_id: str | Path,
    *,
    mesh: DeviceMesh | None = None,
    lora: LoRAConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
    device: torch.device | str | None = None,
    activation_checkpointing: Mode = "none",
    layout: Layout = SHARDED,
    random_init: bool = False,
    seed: int = 0,
) -> CausalLM:
    """Read a Hugging Face checkpoint into an NF4 model, sharded over ``mesh`` when one is given.

    No rank ever holds a full-size 16-bit model: each reads its own rows of each tensor, quantizes them and keeps the
    packed bytes, which are the same for any number of ranks.

    Args:
        path_or_id: a folder with config.json and safetensors, or a Hub id.
        mesh: shard over it with FSDP2 before anything is read; every rank calls this.
        lora: add adapters, at no change; all else is frozen.
        dtype: of what is not quantized (embedding, norms, biases, head) and of the activations: bfloat16 or float32.
        revision: of a Hub id.
        device: where the model lives; by default the current GPU, or the CPU where there is none.
        activation_checkpointing: what of each block is recomputed in backward.
        layout: where the frozen weights are kept.
        random_init: take config.json alone and draw the weights, for benchmarks.
        seed: of the adapters, and of random weights.

    Raises:
        ValueError: an architecture or a configuration key that is unknown; tensors that are missing, surplus, of
            another shape, truncated, or not finite. Each is named.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be bfloat16 or float32, got {dtype}")
    folder = find_checkpoint(path_or_id, revision, weights=not random_init)
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = skeleton(config, lora, dtype)
    lay_out(
        model,
        mesh,
        device,
        layout=layout,
        checkpointing=activation_checkpointing,
        param_dtype=torch.bfloat16 if dtype == torch.bfloat16 else None,
    )
    source = RandomWeights(seed, 0.02, device, {}) if random_init else SafetensorsFolder(folder)
    _fill(model, source, config, seed)
    return model


def skeleton(config: ModelConfig, lora: LoRAConfig | None, dtype: torch.dtype) -> CausalLM:
    """The model on the meta device: every parameter's shape, no memory."""
    with torch.device("meta"):
        model = CausalLM(config, dtype=dtype)
        kept = lora.is_saved if lora else lambda name: False
        quantize_(model, lambda name, _: name != "lm_head" and not kept(name))
        model.requires_grad_(False)
        if lora is not None:
            add_lora(model, lora)
    return model


def checkpoint_name(name: str) -> str:
    """The name in a Hugging Face checkpoint of what the model calls ``name``: adapters leave no trace in it."""
    return name.replace(".base_layer.", ".")


def _fill(model: CausalLM, source: WeightSource, config: ModelConfig, seed: int) -> None:
    source.check(expected_shapes(model))
    with torch.no_grad():
        for prefix, module in model.named_modules():
            if isinstance(module, NF4Linear):
                _fill_packed(module, source, checkpoint_name(f"{prefix}.weight"))
            if isinstance(module, LoRALinear):
                _fill_adapter(module, initial_A(prefix, seed, *module.lora_A.weight.shape))
        for name, parameter in _plain_parameters(model):
            rows = parallel.own_rows(parameter)
            parallel.local(parameter).copy_(_read(source, checkpoint_name(name), rows, parameter.device))


def _plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is stored as it is in the checkpoint: neither packed nor an adapter's. A tied weight comes once."""
    for prefix, module in model.named_modules():
        if ".lora_A" in prefix or ".lora_B" in prefix:
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if not (isinstance(module, NF4Linear) and parameter is not module.bias) and not _is_tied_head(model, name):
                yield name, parameter


def _is_tied_head(model: nn.Module, name: str) -> bool:
    return name == "lm_head.weight" and model.get_parameter(name) is model.get_parameter("model.embed_tokens.weight")


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every tensor that the checkpoint must hold, by its name there."""
    shapes = {checkpoint_name(name): tuple(p.shape) for name, p in _plain_parameters(model)}
    for prefix, module in model.named_modules():
        if isinstance(module, NF4Linear):
            shapes[checkpoint_name(f"{prefix}.weight")] = (module.out_features, module.in_features)
    return shapes


def parameter_count(model: nn.Module) -> int:
    """How many parameters the checkpoint behind ``model`` has, adapters left out."""
    return sum(math.prod(shape) for shape in expected_shapes(model).values())


def _read(source: WeightSource, name: str, rows: parallel.RowRange, device: torch.device) -> Tensor:
    values = source.rows(name, rows.start, rows.stop).to(device)
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity; the checkpoint is damaged or was saved after a divergence")
    return values


def _fill_packed(layer: NF4Linear, source: WeightSource, name: str) -> None:
    """Quantize this rank's rows; the two figures that span ranks, offset and scales, are agreed on exactly."""
    rows = parallel.own_rows(layer.weight)
    # on the device that computes: the weight itself may wait in host memory
    codes, absmax = ops.nf4_quantize(_read(source, name, rows, layer.weight_absmax_scales.device))
    G = absmax.shape[1]
    offset = _agreed_offset(absmax, rows).to(absmax.device)
    scales = nf4.absmax_scales(absmax, offset, first_row=rows.start, rows=rows.total)
    _all_reduce(scales, dist.ReduceOp.MAX, rows)
    absmax_codes = nf4.encode_absmax(absmax, scales, offset, first_row=rows.start)
    assert layer.weight_absmax.shape[1] * 2 == G + G % 2
    parallel.local(layer.weight).view(torch.uint8).copy_(codes)
    parallel.local(layer.weight_absmax).view(torch.uint8).copy_(pad_absmax(absmax_codes))
    layer.weight_absmax_scales.copy_(scales)
    layer.weight_absmax_offset.copy_(offset)


def _agreed_offset(absmax_NG: Tensor, rows: parallel.RowRange) -> Tensor:
    """The offset of the whole weight. Each row sum comes from one rank alone, the others add 0: exact."""
    sums_N = torch.zeros(rows.total, dtype=torch.float64, device=absmax_NG.device)
    sums_N[rows.start : rows.stop] = nf4.absmax_row_sums(absmax_NG)
    _all_reduce(sums_N, dist.ReduceOp.SUM, rows)
    return nf4.absmax_offset(sums_N, absmax_NG.shape[1])


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, rows: parallel.RowRange) -> None:
    if rows.group is not None:
        dist.all_reduce(tensor, op, group=rows.group)


def _fill_adapter(layer: LoRALinear, whole_A: Tensor) -> None:
    rows = parallel.own_rows(layer.lora_A.weight)
    parallel.local(layer.lora_A.weight).copy_(whole_A[rows.start : rows.stop])
    parallel.local(layer.lora_B.weight).zero_()
