"""transformers: ``from_pretrained(..., quantization_config=QShardedConfig())`` gives a model of PackedLinear layers.

Importing this module registers the configuration and its quantizer under "qsharded", which is also what transformers
needs to read such a model again.

    model = AutoModelForCausalLM.from_pretrained(path_or_id, quantization_config=QShardedConfig())
    model.save_pretrained(folder)  # the packed bytes, which from_pretrained(folder) reads as they are

What is saved is what ``python -m qsharded.quantize`` writes, so each reads the other's: codes uint8 [N, K/2] under the
weight's name, and beside it _absmax uint8 [N, G], _absmax_scales and _absmax_offset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qsharded.checkpoint.expert_layouts import is_of_experts
from qsharded.checkpoint.fill_shards import FiniteCheck, shared
from qsharded.checkpoint.packed_format import QUANT_METHOD as METHOD
from qsharded.checkpoint.packed_format import own_quant_format, torn_rows
from qsharded.distributed.agreement import refused_by_all
from qsharded.distributed.exact_all_gather import use_exact_gather
from qsharded.integrations import bitsandbytes_format
from qsharded.integrations import transformers_expert_biases as expert_biases
from qsharded.integrations import transformers_experts as expert_loading
from qsharded.quant import blockwise8, formats
from qsharded.quant.convert import quantize_
from qsharded.quant.experts import ExpertLinears, PackedExperts
from qsharded.quant.linear import PackedLinear
from qsharded.quant.pack_weight import pack_weight
from qsharded.quant.packed_module import PackedModule
from qsharded.quant.packed_weight import pad_absmax
from qsharded.utils.sharding import own_rows

_ABSMAX = "weight_absmax"

_Stored = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@register_quantization_config(METHOD)
@dataclass(kw_only=True, repr=False)
class QShardedConfig(QuantizationConfigMixin):
    """How a model is quantized: to 4 bits, in every linear layer but the output head.

    Args:
        modules_to_not_convert: names, endings or regexes of linear layers to leave in 16 bits, in place of the head
            (which then is quantized unless it is among them).
        double_quant: keep the blocks' maxima in 8 bits, or else in fp32: 4.127 or 4.5 bits a weight.
        stored_as: whose packed tensors the checkpoint holds: "qsharded" or "bitsandbytes". Set by
            :func:`from_bitsandbytes`; a saved model is always "qsharded".
        format: the codebook: "nf4", or bitsandbytes' "fp4".
        block_size: weights that share an absmax: 32, 64, 128 and so on to 4096. The fast kernels are for blocks of 64.
        version, absmax_block_size: what a saved model says besides; there is no other yet.

    Raises:
        ValueError: a format that is not supported.
    """

    quant_method: str = METHOD  # type: ignore[assignment]  # transformers' enum cannot be extended
    modules_to_not_convert: list[str] | None = None
    double_quant: bool = True
    stored_as: str = METHOD
    version: int = 1
    format: str = "nf4"
    block_size: int = formats.BLOCK
    absmax_block_size: int = blockwise8.BLOCK

    def __post_init__(self) -> None:
        try:
            own_quant_format(vars(self))
        except ValueError as error:
            raise ValueError(f"QShardedConfig: {error}") from None


def from_bitsandbytes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model that bitsandbytes quantized to 4 bits, changed so that it loads into our layers.

        config = from_bitsandbytes(AutoConfig.from_pretrained(path_or_id))
        model = AutoModelForCausalLM.from_pretrained(path_or_id, config=config)

    The bytes are taken over, nothing is quantized again. bitsandbytes itself is not needed.

    Raises:
        ValueError: the checkpoint is not bitsandbytes' in 4 bits.
    """
    settings = bitsandbytes_format.read_settings(getattr(config, "quantization_config", None))
    config.quantization_config = QShardedConfig(
        modules_to_not_convert=settings.skipped,
        double_quant=settings.double_quant,
        stored_as="bitsandbytes",
        format=settings.quant_type,  # the size of the blocks is not said: it is read with the weights
    ).to_dict()
    return config


@register_quantizer(METHOD)
class QShardedQuantizer(HfQuantizer):
    """Swaps the linear layers before weights are read, and quantizes or unpacks each as it arrives."""

    quantization_config: QShardedConfig

    def update_device_map(self, device_map: Any) -> Any:
        """Quantize on the GPU where there is one, as bitsandbytes does."""
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        _refuse_other_parallelism(model, config.stored_as)
        skipped = self.get_modules_to_not_convert(model, config.modules_to_not_convert)
        files = checkpoint_files or []
        packs_experts = self._packs_experts(files)

        def is_quantized(name: str, linear: nn.Module) -> bool:
            if isinstance(linear, ExpertLinears):
                names = name, name.rpartition(".")[0]  # the experts may be named, or one projection of them
                return packs_experts and all(should_convert_module(said, skipped) for said in names)
            # a subclass may compute something else
            return type(linear) is nn.Linear and should_convert_module(name, skipped)

        if config.stored_as != METHOD:
            _refuse_changed_codes(bitsandbytes_format.code_dtypes(files, config.format))
            config.block_size = bitsandbytes_format.stored_block_size(files, config.format) or config.block_size
            _refuse_torn_rows(
                [named for named in model.named_modules() if is_quantized(*named)], own_quant_format(vars(config))
            )
        quantize_(
            model,
            is_quantized,
            quant_type=config.format,
            block_size=config.block_size,
            double_quant=config.double_quant,
        )

        self._bias_rules = expert_biases.bias_rules(model)
        if not self.pre_quantized:
            expert_loading.expect(model)
        elif packs_experts:
            expert_loading.refuse_half_packed(model, is_quantized)

    def _packs_experts(self, files: list[str]) -> bool:
        """As our own form holds them, which is doubly quantized; a packed checkpoint says by its names if it does."""
        config = self.quantization_config
        if not self.pre_quantized or config.stored_as != METHOD:
            return config.double_quant and config.stored_as == METHOD
        return any(is_of_experts(name) for name in _names_in(files))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        prefix, _, name = param_name.rpartition(".")
        if expert_loading.of_experts(model, param_name) is not None:
            return True
        return name == "weight" and isinstance(model.get_submodule(prefix), PackedModule)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        if self.quantization_config.stored_as == METHOD:
            return _own_conversions()
        companions = [f"weight.{name}" for name in bitsandbytes_format.companions(self.quantization_config.format)]
        return [WeightConverter([*companions, "weight"], "weight", [_TakeOver(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """The model's rules, with ours; those that stack experts read them one by one. transformers before 5.21 does
        not give the model."""
        updated = [*super().update_weight_conversions(weight_conversions, *model), *self._bias_rules]
        return updated if self.pre_quantized else [expert_loading.one_at_a_time(rule) for rule in updated]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        expert_loading.expect_no_more(model)
        self.quantization_config.stored_as = METHOD
        _save_in_our_form(model)
        for module in model.modules():
            if isinstance(module, PackedModule):
                module.requires_grad_(False)
        use_exact_gather(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _refuse_other_parallelism(model: PreTrainedModel, stored_as: str) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    if distributed is None:
        return
    for key in ("tp_size", "pp_size", "ep_size"):
        if (getattr(distributed, key, None) or 1) > 1:
            raise ValueError(
                f"{key} = {getattr(distributed, key)}: a QSharded model can be sharded by FSDP2 alone, not by tensor, "
                "pipeline or expert parallelism; use DistributedConfig(fsdp_size=...)"
            )
    if stored_as != METHOD and (distributed.fsdp_size or 1) > 1:
        raise ValueError(
            "a bitsandbytes checkpoint cannot be read into shards: load it in one process, save_pretrained it, and "
            "load what that wrote"
        )


def _refuse_torn_rows(linears: list[tuple[str, Any]], quant_format: formats.QuantFormat) -> None:
    for name, linear in linears:
        if linear.in_features % quant_format.block_size:
            raise ValueError(torn_rows(name, linear.in_features, quant_format))


def _names_in(files: list[str]) -> Iterator[str]:
    for path in (path for path in files if path.endswith(".safetensors")):
        with safe_open(path, framework="pt") as file:
            yield from file.keys()


def _own_conversions() -> list[WeightConverter]:
    # the second level is changed by no rule, and would be by the model's own, of all that is below its experts' name
    names = (f"{_ABSMAX}_scales", f"{_ABSMAX}_offset", _ABSMAX, "weight")
    return [WeightConverter(name, name, [_AsParameter()]) for name in names]


def _save_in_our_form(model: PreTrainedModel) -> None:
    """Saving undoes the conversions of loading; wherever the weights came from, they are saved in our form."""
    used: Any = getattr(model, "_weight_conversions", None) or []
    others = [conversion for conversion in used if not _is_ours(conversion)]
    ours = [*expert_biases.bias_rules(model), *_own_conversions()]
    model._weight_conversions = [*others, *ours]  # type: ignore[assignment]


def _is_ours(conversion: Any) -> bool:
    own = (_TakeOver, _AsParameter, *expert_biases.OPERATIONS)
    return any(isinstance(operation, own) for operation in getattr(conversion, "operations", ()))


class _Quantize(ConversionOps):
    """A 16-bit weight, or this rank's rows of it, becomes what its PackedLinear holds; experts', what ours do."""

    def __init__(self, quantizer: QShardedQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        [(name, value)] = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        if expert_loading.of_experts(kwargs["model"], name) is not None:
            return expert_loading.packed_parameters(kwargs["model"], name, value, kwargs.get("missing_keys"))
        rows = own_rows(kwargs["model"].get_parameter(name))
        config = self.hf_quantizer.quantization_config
        with refused_by_all([rows.group] if rows.group else [], value.device):
            finite = FiniteCheck(name)
            finite.add(value)
            finite.demand()
        quant_format = own_quant_format(vars(config))
        packed = pack_weight(value, quant_format, double_quant=config.double_quant, rows=shared(rows))
        return _named((*packed.stored_rows(), packed.absmax_scales, packed.absmax_offset), name)


class _AsParameter(ConversionOps):
    """Rows of bytes, as they are stored, become the bf16 rows of a PackedLinear; other weights pass."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        [(name, value)] = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        size = _stored_row(kwargs["model"], kwargs["full_layer_name"])
        return {name: value if size is None else self._change(value, size)}

    def _change(self, rows: Tensor, size: int) -> Tensor:
        return (pad_absmax(rows) if size % 2 else rows).view(torch.bfloat16)

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsStored()


class _AsStored(_AsParameter):
    """And back, for saving."""

    def _change(self, rows: Tensor, size: int) -> Tensor:
        return rows.view(torch.uint8)[:, :size].contiguous()

    @property
    def reverse_op(self) -> ConversionOps:
        return _AsParameter()


def _refuse_changed_codes(dtypes: set[str]) -> None:
    """Transformers before 5.21 makes bf16 numbers of codes that a checkpoint stores as another floating type."""
    changed = sorted(dtypes - {"U8", "BF16"})
    if changed and not hasattr(HfQuantizer, "get_new_dtype"):
        raise ValueError(
            f"the 4-bit codes are stored as {', '.join(changed)}, which transformers {transformers.__version__} would "
            "change while it loads them; install transformers 5.21 or newer"
        )


def _stored_row(model: PreTrainedModel, name: str) -> int | None:
    """Bytes of a stored row of the parameter ``name`` if it is a packed layer's codes or absmax, else None."""
    prefix, _, own = name.rpartition(".")
    layer = model.get_submodule(prefix)
    if not isinstance(layer, PackedLinear | PackedExperts) or own not in ("weight", _ABSMAX):
        return None
    if own == "weight":
        return layer.in_features // 2
    is_nested = layer.weight_absmax_scales is not None
    return (
        layer.in_features // layer.block_size * (1 if is_nested else layer.quant_format.scale_encoding.dtype.itemsize)
    )


class _TakeOver(ConversionOps):
    """The tensors of bitsandbytes become those of a PackedLinear; other weights pass."""

    def __init__(self, quantizer: QShardedQuantizer) -> None:
        self.hf_quantizer = quantizer  # under this name, transformers leaves the stored dtypes alone

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        model, full_name = kwargs["model"], kwargs["full_layer_name"]
        stored = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if not self.hf_quantizer.param_needs_quantization(model, full_name):
            return {"weight": stored["weight"].to(model.get_parameter(full_name).dtype)}
        by_name = {name.removeprefix("weight."): value for name, value in stored.items()}
        quant_format = own_quant_format(vars(self.hf_quantizer.quantization_config))
        return _named(bitsandbytes_format.packed_tensors(by_name, quant_format, full_name), "weight")


def _named(stored: _Stored, weight: str) -> dict[str, Tensor]:
    names = weight, f"{weight}_absmax", f"{weight}_absmax_scales", f"{weight}_absmax_offset"
    return {name: tensor for name, tensor in zip(names, stored, strict=True) if tensor is not None}
