"""An estimate of a run's tokens a second, from what its products, its memory and its links must at least do.

A micro-batch takes the time of its products, at the share of the data sheet's rate that a large product reaches, and of
dequantizing each layer for each pass; or the time of bringing the weights, from other ranks or the host, where that is
longer; or of launching the kernels, which bounds small models. The shares are those of H200s, where the recorded runs
are met within 25% (tests/plan/test_speed.py).

Axes: S tokens of a row.
"""

from dataclasses import dataclass

from qsharded.checkpoint.load import packed_modules
from qsharded.lora.experts import LoRAExperts
from qsharded.models import CausalLM
from qsharded.plan.gpu_memory import Plan
from qsharded.plan.parameters import CODES, SCALES, parameters
from qsharded.quant.experts import PackedExperts
from qsharded.quant.linear import PackedLinear
from qsharded.utils.cards import Card

_OF_THE_PEAK = 0.62  # of the data sheet's operations a second, by products, attention and what lies between them
_OF_THE_MEMORY = 0.85
_OF_A_LINK = 0.7
_KERNELS_OF_A_LAYER = 70  # of a micro-batch, all else shared out among layers: the fewest of train_step.json
_LAUNCH_S = 5e-6  # the least that a host takes for one
_BF16 = 2
_FORWARD, _INPUT_GRAD = 2, 2  # operations a frozen weight and token; it has no gradient of its own
_ATTENTION_BACKWARD = 2.5  # five products, where the forward has two


@dataclass(frozen=True)
class Speed:
    """An estimate: seconds of an optimizer step, and the tokens of all ranks in it, padding included."""

    step_s: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step_s


def tokens_of_a_step(plan: Plan) -> int:
    """Of all ranks, where every row is full."""
    config = plan.config
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * plan.ranks
    return rows * config.max_length


def estimate(model: CausalLM, plan: Plan, card: Card) -> Speed:
    """The speed of the planned run on ``card``; the optimizer's step and saving are left out."""
    config = plan.config
    tokens = config.per_device_train_batch_size * config.max_length
    launching = model.config.num_hidden_layers * _KERNELS_OF_A_LAYER * _LAUNCH_S
    micro_batch = max(_computing(model, plan, card, tokens), _bringing(model, plan, card), launching)
    micro_batch += _inputs(model, plan, card)
    return Speed(micro_batch * config.gradient_accumulation_steps, tokens_of_a_step(plan))


def _again(model: CausalLM, plan: Plan) -> float:
    """The part of the layers' forward that backward computes again."""
    checkpointing, layers = plan.config.checkpointing, model.config.num_hidden_layers
    whole = {"none": 0.0, "selective": 0.6}.get(checkpointing.mode, 1.0)
    return whole * checkpointing.checkpointed(layers) / layers


def _computing(model: CausalLM, plan: Plan, card: Card, tokens: int) -> float:
    """Seconds of a micro-batch's products and of dequantizing for them."""
    again, packed = _again(model, plan), sum(map(_values, packed_modules(model)))
    head, trained = model.lm_head.weight.numel(), _trained_values(model)
    products = _multiplied_values(model) * (_FORWARD * (1 + again) + _INPUT_GRAD) + head * (_FORWARD + _INPUT_GRAD)
    products += trained * (_FORWARD * (2 + again) + _INPUT_GRAD)
    attention = _attention(model, plan.config.max_length) * (1 + again + _ATTENTION_BACKWARD)
    bytes_a_pass = packed * _BF16 + _packed_bytes(model, 1)
    dequantizing = bytes_a_pass * (2 + again) / (card.memory_gb_s * 1e9 * _OF_THE_MEMORY)
    return tokens * (products + attention) / (card.teraflops * 1e12 * _OF_THE_PEAK) + dequantizing


def _attention(model: CausalLM, length: int) -> float:
    """Operations of attention's forward a token: two products with on average S/2 keys, in every layer."""
    config = model.config
    return 2 * length * config.num_attention_heads * config.kernel_head_dim * config.num_hidden_layers


def _bringing(model: CausalLM, plan: Plan, card: Card) -> float:
    """Seconds in which the packed weights come, for each pass, from the other ranks and from the host."""
    passes, sharing = 2 + _again(model, plan), plan.ranks // plan.config.dp_replicate
    whole = _packed_bytes(model, 1)
    is_sharded = plan.config.sharding != "replicate"
    gathered = whole * (sharing - 1) / sharing * is_sharded / (card.link_gb_s * 1e9 * _OF_A_LINK)
    from_host = whole / sharing * plan.config.cpu_offload / (card.host_gb_s * 1e9 * _OF_A_LINK)
    return passes * (gathered + from_host)


def _inputs(model: CausalLM, plan: Plan, card: Card) -> float:
    """Seconds in which layers' inputs go to the host and come back."""
    return 2 * plan.on_host.activations / (card.host_gb_s * 1e9 * _OF_A_LINK)


def _values(layer: PackedLinear | PackedExperts) -> int:
    return layer.weight.shape[0] * layer.in_features


def _multiplied_values(model: CausalLM) -> float:
    """Of the packed weights those that a token is multiplied by: of all experts its own alone."""
    modules = packed_modules(model)
    return sum(_values(layer) * (_of_experts(model) if isinstance(layer, PackedExperts) else 1) for layer in modules)


def _trained_values(model: CausalLM) -> float:
    """Likewise."""
    experts = {p for module in model.modules() if isinstance(module, LoRAExperts) for p in module.updates().values()}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return sum(p.numel() * (_of_experts(model) if p in experts else 1) for p in trained)


def _of_experts(model: CausalLM) -> float:
    """A token's share of the experts."""
    mixture = model.config.mixture
    return mixture.per_token / mixture.experts if mixture else 1.0


def _packed_bytes(model: CausalLM, ranks: int) -> int:
    resident = parameters(model, ranks=ranks).resident
    return resident[CODES] + resident[SCALES]
