"""PEFT: LoRA on PackedLinear layers.

    install()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))

PEFT chooses the adapter's class by the type of the layer, and knows no way to add a type for good: a configuration can
be told (:func:`register`), one by one, and "all-linear" cannot. So :func:`install` wraps the one function of PEFT's
that meets every configuration before layers are replaced; :func:`uninstall` takes the wrapper off.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from qsharded.checkpoint.adapter import STARTS_ON_BASE
from qsharded.lora.config import ends_with
from qsharded.quant.fused_experts import SplitExperts
from qsharded.quant.linear import PackedLinear
from qsharded.utils import collectives
from qsharded.utils.sharding import whole

_HOOK = "_maybe_include_all_linear_layers"
_ALL_LINEAR = "all-linear"


def install() -> None:
    """Have PEFT adapt PackedLinear layers, by name and by "all-linear", until :func:`uninstall`. Twice is as once.

    Raises:
        RuntimeError: this version of PEFT has another inside; register each configuration instead.
    """
    original = getattr(tuners_utils, _HOOK, None)
    if original is None:
        raise RuntimeError(
            f"PEFT has no tuners_utils.{_HOOK} any more: pass each LoraConfig through register() instead"
        )
    if isinstance(original, _Hook):
        return
    setattr(tuners_utils, _HOOK, _Hook(original))


def uninstall() -> None:
    """Leave PEFT as it was before :func:`install`. Models that have adapters keep them."""
    hook = getattr(tuners_utils, _HOOK, None)
    if isinstance(hook, _Hook):
        setattr(tuners_utils, _HOOK, hook.original)


def register(config: LoraConfig) -> LoraConfig:
    """Tell one configuration how to adapt PackedLinear, which it must name: "all-linear" needs :func:`install`."""
    config._register_custom_module({PackedLinear: PackedLoraLinear})
    return config


class _Hook:
    """What PEFT calls with each configuration and model before it looks for layers to replace."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, config: PeftConfig, model: nn.Module) -> PeftConfig:
        targets = getattr(config, "target_modules", None)
        config = self.original(config, model)
        if not isinstance(config, LoraConfig):
            return config
        _refuse_packed_experts(config, model)
        if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
            config.target_modules = sorted({*(config.target_modules or ()), *_free_linears(model)})
        return register(config)


def _refuse_packed_experts(config: LoraConfig, model: nn.Module) -> None:
    """PEFT would find no such parameter, and train the rest."""
    for name, module in model.named_modules():
        parts = module.parameter_shapes() if isinstance(module, SplitExperts) else ()
        for entry in config.target_parameters or ():
            if any(ends_with(f"{name}.{part}", entry) for part in parts):
                raise ValueError(
                    f"target_parameters = {entry!r}: {name} is packed, and PEFT adapts no packed experts; `qsharded "
                    "train` does, in PEFT's files. Or keep them in 16 bits: QShardedConfig(modules_to_not_convert="
                    "['lm_head', 'experts'])"
                )


def _free_linears(model: nn.Module) -> Iterator[str]:
    """The packed linear layers that have no adapter yet, the output head left out, as PEFT does."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    adapted = [name for name, module in model.named_modules() if isinstance(module, tuners_utils.BaseTunerLayer)]
    inside = tuple(f"{name}." for name in adapted)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module is not head and not name.startswith(inside):
            yield name


class _DoraLayer(DoraLinearLayer):
    """DoRA's magnitudes beside a packed layer: whatever asks for its weight gets the dequantized one."""

    def update_layer(self, *, base_layer: PackedLinear, **kwargs: Any) -> None:
        super().update_layer(base_layer=_dequantized(base_layer, torch.float32), **kwargs)

    def forward(self, x: Tensor, *, base_layer: PackedLinear, **kwargs: Any) -> Tensor:
        return super().forward(x, base_layer=_dequantized(base_layer, x.dtype), **kwargs)


class _DoraVariant(DoraLinearVariant):
    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """As PEFT's, with magnitudes of our kind."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = _DoraLayer(fan_in_fan_out=False)
        lora_A, lora_B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        layer.update_layer(
            base_layer=module.get_base_layer(), lora_A=lora_A, lora_B=lora_B, scaling=module.scaling[adapter_name]
        )
        module.lora_magnitude_vector[adapter_name] = layer


def _dequantized(layer: PackedLinear, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with the dequantized weight and the same bias, for as long as it is held."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    linear.register_parameter("bias", layer.bias)
    return linear.train(layer.training)


class PackedLoraLinear(peft_layer.Linear):
    """PEFT's LoRA layer around a PackedLinear: LoRA, rsLoRA and DoRA; a merge dequantizes, adds and quantizes again.

    Unmerging gives back the very bytes from before merging.
    """

    _before_merging: tuple[PackedLinear, ...] = ()  # in a tuple: as an attribute it would become a part of this module

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): _DoraVariant}

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, None]:
        """No dtype: that of the packed bytes says nothing of the adapter's."""
        return base_layer.weight.device, None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Raises ValueError for a start of the adapter that would change the base weights."""
        if config.init_lora_weights not in STARTS_ON_BASE:
            raise ValueError(
                f"init_lora_weights = {config.init_lora_weights!r} changes the base weights, which cannot be done to "
                "packed ones; use True, 'gaussian', 'orthogonal' or 'eva'"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the dequantized weight, in fp32, and quantize the sum, once for all that are merged.

        Raises:
            ValueError: the layer is sharded.
        """
        if not isinstance(self.base_layer, PackedLinear):  # PEFT merging several DoRA adapters in turn
            super().merge(safe_merge, adapter_names)
            return
        adapter_names = tuners_utils.check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        if self.merged:
            adapter_names = [*self.merged_adapters, *adapter_names]
            self.unmerge()
        packed = self.base_layer
        try:
            self.base_layer = _to_merge_into(packed)
            super().merge(safe_merge, adapter_names)
            merged = _packed_again(self.base_layer, packed) if self.merged else packed
        except BaseException:
            self.base_layer, self.merged_adapters = packed, []
            raise
        self.base_layer, self._before_merging = merged, (packed,)

    def unmerge(self) -> None:
        """Put back the layer from before merging."""
        if not self.merged or not isinstance(self.base_layer, PackedLinear):
            super().unmerge()
            return
        [self.base_layer] = self._before_merging
        self._before_merging, self.merged_adapters = (), []
        self._caches.clear()


def _to_merge_into(packed: PackedLinear) -> nn.Linear:
    if isinstance(packed.weight, DTensor):
        raise ValueError("a sharded layer cannot be merged: save the adapter and merge it in one process")
    linear = _dequantized(packed, torch.float32)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias.detach().clone(), requires_grad=False)  # a LoRA bias is added in place
    return linear


def _packed_again(linear: nn.Linear, like: PackedLinear) -> PackedLinear:
    double_quant = like.weight_absmax_scales is not None
    return PackedLinear.from_linear(
        linear, quant_type=like.quant_type, block_size=like.block_size, double_quant=double_quant
    )


def save_adapter(model: PeftModel, folder: Path | str) -> None:
    """Write the trainable parameters of a sharded model as PEFT's ``save_pretrained`` writes those of a whole one.

    Every rank calls this: one parameter after the other is gathered, and rank 0 writes.
    """
    is_main = collectives.rank(collectives.every_rank()) == 0
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = whole(parameter.detach())
            if is_main:
                gathered[name] = full.cpu()
    if is_main:
        model.save_pretrained(str(folder), state_dict=gathered)
