"""Adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors, written and read shard by shard."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qsharded.checkpoint import safetensors_header
from qsharded.checkpoint.adapter_targets import written_targets
from qsharded.checkpoint.files import TensorParts, write_json, write_tensors
from qsharded.checkpoint.per_expert_adapter import PerExpertFile, is_per_expert
from qsharded.checkpoint.tied_embeddings import EMBEDDING, HEAD
from qsharded.distributed.agreement import groups_sharing, refused_by_all
from qsharded.lora.config import LoRAConfig
from qsharded.lora.experts import LoRAExperts
from qsharded.lora.layer import lora_layers
from qsharded.lora.targets import peft_name
from qsharded.quant.linear import PackedLinear
from qsharded.utils.sharding import local, own_rows, whole
from qsharded.utils.stored_buffers import stored_buffers
from qsharded.utils.untrusted_json import (
    BOOLEAN,
    NULL,
    Kind,
    check,
    integer,
    list_of,
    map_of,
    named,
    number,
    read_json,
    text,
)

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CARD_FILE = "README.md"
PREFIX = "base_model.model."

logger = logging.getLogger(__name__)

# Fields of PEFT's LoraConfig that change nothing in the forward of a trained adapter, beside those that we read.
_WITHOUT_EFFECT = {
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_core",
    "qalora_group_size", "task_type", "ensure_weight_tying", "runtime_config",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern",
    "modules_to_save", "bias", "init_lora_weights", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters",
}  # fmt: skip
# Starts that leave the base weights as they are. PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA train beside changed ones.
STARTS_ON_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


_RANK, _ALPHA, _LAYER = integer(1, 1 << 20), number(0, 1e9, or_equal=True), integer(0, 1 << 16)
_REGEX = Kind("a list of names, or a regular expression", lambda value: text().holds(value) and _compiles(value))
_NAMES = list_of(text(), 1 << 16)
SCHEMA = {
    "peft_type": text() | NULL,
    "base_model_name_or_path": text() | NULL,
    "revision": text() | NULL,
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "lora_dropout": number(0, 1, or_equal=True),
    "target_modules": _NAMES | _REGEX | NULL,
    "target_parameters": _NAMES | NULL,
    "use_rslora": BOOLEAN,
    "rank_pattern": map_of(_RANK, 1 << 16, key=_REGEX) | NULL,
    "alpha_pattern": map_of(_ALPHA, 1 << 16, key=_REGEX) | NULL,
    "modules_to_save": _NAMES | NULL,
    "exclude_modules": _NAMES | _REGEX | NULL,
    "layers_to_transform": _LAYER | list_of(_LAYER, 1 << 16) | NULL,
    "layers_pattern": _REGEX | list_of(_REGEX, 1 << 16) | NULL,
    "bias": text() | NULL,
}


def _compiles(pattern: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of syntax that a later Python may read otherwise
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in an adapter file, parameter) of everything that trains, in the model's order."""
    return ((stored_name(model, name), p) for name, p in model.named_parameters() if p.requires_grad)


def buffers_beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of what checkpoints hold beside parameters that train in full, such as a router's correction bias:
    PEFT writes it with them, and misses it where it is not."""
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            yield from stored_buffers(module, prefix)


def stored_name(model: nn.Module, name: str) -> str:
    """What an adapter file calls what ``model`` calls ``name``."""
    return PREFIX + peft_name(model, name)


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    folder: Path,
    *,
    base_model: str,
    revision: str | None = None,
    metadata: Mapping[str, str] | None = None,
    is_main: bool = True,
) -> None:
    """Write the adapter of ``model`` into ``folder``, in PEFT's names, ``metadata`` into its safetensors file.

    Every rank calls this: one trainable parameter after the other is gathered, and the main rank writes. Frozen
    weights are not touched.

    Raises:
        NotWritten: on the main rank alone, a file that could not be written; the one before is then still there.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in trainable(model):
        full = whole(parameter.detach())
        if is_main:
            weights[name] = full.cpu().contiguous()
    if not is_main:
        return
    weights |= {stored_name(model, name): buffer.cpu() for name, buffer in buffers_beside(model)}
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: TensorParts(tensor.dtype, tuple(tensor.shape), [tensor]) for name, tensor in weights.items()}
    write_tensors(folder / WEIGHTS_FILE, parts, {"format": "pt", **(metadata or {})})
    write_json(folder / CONFIG_FILE, peft_config(model, config, base_model, revision))


def peft_config(model: nn.Module, config: LoRAConfig, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        **written_targets(model, config),
        "use_rslora": config.use_rslora,
        "modules_to_save": _written_saved(model, config),
        "exclude_modules": config.exclude_modules or None,
        "layers_to_transform": config.layers_to_transform or None,
        "layers_pattern": config.layers_pattern or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
    }


def _written_saved(model: nn.Module, config: LoRAConfig) -> list[str] | None:
    """Whole names: PEFT takes an ending without its dot too, and "norm" would be every layer norm there."""
    endings = tuple(f".{target}" for target in config.modules_to_save)
    names = (name for name, _ in model.named_modules() if f".{name}".endswith(endings)) if endings else ()
    return [peft_name(model, name) for name in names] or None


def read_lora_config(folder: Path, dtype: torch.dtype = torch.float32) -> LoRAConfig:
    """The configuration of an adapter that PEFT or qsharded wrote.

    Raises:
        ValueError: no LoRA adapter, or a setting that changes the forward and is unknown here; each is named.
    """
    path = folder / CONFIG_FILE
    read = read_json(path)
    check(read, SCHEMA, str(path))
    if read.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be LORA, got {read.get('peft_type')!r}")
    unknown = [key for key in sorted(read.keys() - _WITHOUT_EFFECT - _READ) if _is_set(key, read[key])]
    if unknown or read.get("bias", "none") != "none":
        raise ValueError(f"{path}: not supported: " + ", ".join(f"{k} = {read[k]!r}" for k in unknown or ["bias"]))
    _refuse_changed_base(read.get("init_lora_weights"), path)
    with named(str(path)):
        lora = _lora_config(read, dtype)
    _refuse_tied_adapters(read, lora, path)
    return _with_experts(lora, folder / WEIGHTS_FILE)


def _with_experts(lora: LoRAConfig, path: Path) -> LoRAConfig:
    """Where the file has tensors for each expert, what their layers' names mean here."""
    if not path.is_file():
        return lora
    with open_weights(path) as file:
        return file.adapts(lora) if isinstance(file, PerExpertFile) else lora


def _lora_config(read: dict[str, Any], dtype: torch.dtype) -> LoRAConfig:
    return LoRAConfig(
        r=read.get("r", 8),
        lora_alpha=read.get("lora_alpha", 8),
        lora_dropout=read.get("lora_dropout", 0.0),
        target_modules=read.get("target_modules") or [],
        target_parameters=read.get("target_parameters") or [],
        use_rslora=read.get("use_rslora", False),
        rank_pattern=read.get("rank_pattern") or {},
        alpha_pattern=read.get("alpha_pattern") or {},
        modules_to_save=read.get("modules_to_save") or [],
        exclude_modules=read.get("exclude_modules") or [],
        layers_to_transform=_as_list(read.get("layers_to_transform")),
        layers_pattern=_as_list(read.get("layers_pattern")),
        dtype=dtype,
        strict=False,
    )


def _refuse_tied_adapters(read: dict[str, Any], lora: LoRAConfig, path: Path) -> None:
    """Where nothing of the embedding or the head trains, the setting is without effect."""
    if read.get("ensure_weight_tying"):
        for name in ("model.embed_tokens", "lm_head"):
            if lora.is_target(name) or lora.is_saved(name):
                raise ValueError(f"{path}: not supported: ensure_weight_tying = True with an adapter on {name}")


def _refuse_changed_base(start: Any, path: Path) -> None:
    if start not in STARTS_ON_BASE:
        raise ValueError(
            f"{path}: init_lora_weights = {start!r} trains beside changed base weights, so the adapter does not fit "
            "the base model; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _as_list(value: Any) -> list[Any]:
    """PEFT takes one entry for a list of it; 0 is one."""
    if value in (None, "", []):
        return []
    return value if isinstance(value, list) else [value]


def _is_set(key: str, value: Any) -> bool:
    return value not in (None, False, {}, [], "")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill the trainable parameters of ``model`` from ``folder``; each rank reads its own rows.

    PEFT writes the weight of an adapted embedding or head beside its adapter, and both of them where it was told to
    (``save_embedding_layers``), and reads them in the base's place. So here; where they are others, it is logged.

    Raises:
        ValueError: the file is missing or damaged, or its tensors are not just the model's trainable ones, of their
            shapes, or not finite. The first at fault is named, and on every rank it is the same one.
    """
    parameters = dict(trainable(model))
    device = next((local(p).device for p in parameters.values()), torch.device("cpu"))
    with refused_by_all(groups_sharing(parameters.values()), device):
        _fill(parameters, {**dict(_own_bases(model)), **_frozen(model)}, folder / WEIGHTS_FILE)


def _fill(parameters: Mapping[str, Tensor], bases: Mapping[str, Tensor], path: Path) -> None:
    with open_weights(path) as file:
        names = set(file.keys())
        brought = {name: base for name, base in bases.items() if name in names}
        filled = {**parameters, **brought}
        surplus, missing = sorted(names - filled.keys()), sorted(filled.keys() - names)
        if surplus or missing:
            fault = f"lacks {missing[0]}" if missing else f"holds {surplus[0]}, which the model has no place for"
            raise ValueError(f"{path} {fault}")
        for name, base in brought.items():
            _tell_other_base(file, name, base, path)
        for name, parameter in filled.items():
            copy_rows(file, name, parameter, path)
    _refuse_not_finite(filled, path)


def own_base(layer: str) -> str:
    """What the frozen weight under the adapter on ``layer`` is called."""
    return f"{layer}.base_layer.weight"


def _own_bases(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in an adapter file, frozen weight in 16 or 32 bits) of every adapted layer that has one."""
    for name, layer in lora_layers(model):
        if not isinstance(layer, LoRAExperts) and not isinstance(layer.base_layer, PackedLinear):
            yield stored_name(model, own_base(name)), layer.base_layer.get_parameter("weight")


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """name in an adapter file -> what it may hold though nothing trains or adapts it: the weights of embedding and
    head, and :func:`buffers_beside`."""
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen = (name for name in (EMBEDDING, HEAD) if name in named and not named[name].requires_grad)
    beside = {stored_name(model, name): buffer for name, buffer in buffers_beside(model)}
    return {stored_name(model, name): named[name] for name in frozen} | beside


def _tell_other_base(file: Any, name: str, base: Tensor, path: Path) -> None:
    """Of this rank's rows; of a model on the meta device nothing is known."""
    own = local(base).detach()
    if own.is_meta or tuple(file.get_slice(name).get_shape()) != tuple(base.shape):
        return
    brought = own_stored_rows(file, name, base).to(own.device, own.dtype)
    if not torch.equal(brought, own):
        logger.warning(other_base(name, path))


def other_base(name: str, path: Path) -> str:
    """That an adapter brings another frozen weight than the base model has."""
    return f"note: {path} brings another {name} than the base model's; it takes that one's place, as in PEFT"


def _refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Of this rank's rows. Nothing is known of a model on the meta device."""
    for name, tensor in tensors.items():
        own = local(tensor).detach()
        if not own.is_meta and not own.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity: the file is damaged, or its training diverged")


def open_weights(path: Path) -> Any:
    """An adapter's safetensors file, open.

    Raises:
        ValueError: it is missing, damaged, or lists more than the format or any model has; of a pickled one in its
            place, how to convert it.
    """
    pickled = path.with_name(PICKLED_FILE)
    if pickled.is_file() and not path.is_file():
        raise ValueError(
            f"{pickled} is pickled, which is not read: it could run code. If you trust it, convert it in its folder by "
            'python -c "import torch; from safetensors.torch import save_file; '
            "save_file({k: v.contiguous() for k, v in torch.load("
            f"{pickled.name!r}, map_location='cpu', weights_only=True).items()}}, {path.name!r}, {{'format': 'pt'}})\""
        )
    try:
        safetensors_header.read_checked(path)
        file = safe_open(path, framework="pt")
        return PerExpertFile(file) if is_per_expert(file.keys()) else file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing, damaged or incomplete: {error}") from None


def copy_rows(file: Any, name: str, target: Tensor, path: Path) -> None:
    """Copy this rank's rows of tensor ``name`` in an open safetensors file into ``target``, plain or sharded."""
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != tuple(target.shape):
        raise ValueError(f"{path}: {name} is {tuple(stored.get_shape())}, the model's is {tuple(target.shape)}")
    with torch.no_grad():
        local(target).copy_(own_stored_rows(file, name, target))


def own_stored_rows(file: Any, name: str, target: Tensor) -> Tensor:
    """This rank's rows of tensor ``name``, which is of ``target``'s shape, in an open safetensors file."""
    rows = own_rows(target)
    return cast(Tensor, file.get_slice(name)[rows.start : rows.stop])
