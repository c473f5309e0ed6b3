"""What is measured: a model's shape, a batch and a way to checkpoint; and the arithmetic that such a step needs.

Axes: M tokens of a step, S tokens of a row, D hidden size, V vocabulary.
"""

from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from qsharded.models import ModelConfig

PEAK_BF16_FLOPS = 989e12  # of an H100 or H200, dense, by the data sheet
CHECKPOINTING = ("none", "selective", "full", "offloaded", "auto")


@dataclass(frozen=True)
class Case:
    """A step of random tokens.

    Attributes:
        shape: a model's config.json, without what does not matter.
        rows, length: of the batch.
        shortest: of each step's batch, where every step has another length: its longest row has from ``shortest`` to
            ``length`` tokens, drawn as the longest of ``rows`` rows.
        checkpointing: one of ``CHECKPOINTING``; of "auto", what fits a GPU of ``memory_gib``.
        documents: in each row, of lengths drawn at random; 1 is a plain row.
        rank: of the adapters, on all linear layers.
        lora_dtype: of the adapters.
        steps: that are timed, after three.
        model_code: whose code computes the model: "native", "transformers", or "auto".
    """

    name: str
    shape: dict[str, Any]
    rows: int = 4
    length: int = 2048
    checkpointing: str = "full"
    documents: int = 1
    rank: int = 16
    lora_dtype: str = "bfloat16"
    steps: int = 8
    shortest: int | None = None
    memory_gib: float | None = None
    model_code: str = "auto"

    @property
    def tokens(self) -> int:
        """Of a step; of the longest where they differ."""
        return self.rows * self.length

    def lengths(self) -> list[int]:
        """Of the steps' longest rows, before padding: one for all steps, or one for each."""
        if self.shortest is None:
            return [self.length]
        random = Random(0)
        return [max(random.randint(self.shortest, self.length) for _ in range(self.rows)) for _ in range(self.steps)]

    def to_json(self) -> dict[str, Any]:
        """For a process of its own."""
        return asdict(self)

    def flops(self) -> float:
        """Of a step without recomputation: each frozen weight is multiplied with in forward and once in backward, for
        the gradient of its input; causal attention takes two products in forward and five in backward, of the pairs of
        tokens of which one sees the other; adapters are left out."""
        s, layers = self.shape, self.shape["num_hidden_layers"]
        D, heads = s["hidden_size"], s["num_attention_heads"]
        head_dim = s.get("head_dim") or D // heads
        attention_weights = D * head_dim * (2 * heads + 2 * s["num_key_value_heads"])
        weights = layers * (attention_weights + 3 * D * s["intermediate_size"]) + D * s["vocab_size"]
        windows = ModelConfig.from_hf(s).layer_windows
        pairs = sum(self.tokens * _keys_a_token(self.length / self.documents, window) for window in windows)
        return 4 * weights * self.tokens + 2 * (2 + 5) * heads * head_dim * pairs


def _keys_a_token(length: float, window: int | None) -> float:
    """How many keys a token of a document sees on average; half of them where there is no window."""
    seen = length if window is None else min(window, length)
    return seen - seen**2 / length / 2


def suite(shape: dict[str, Any]) -> list[Case]:
    """The runs that the README's table cites."""
    ragged = Case("4 x 50 to 500, every step another length, full", shape, length=500, shortest=50, steps=60)
    mean = round(sum(ragged.lengths()) / len(ragged.lengths()) / 8) * 8
    windows = shape | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    windows |= {"vocab_size": 32768, "max_position_embeddings": 32768}
    return [
        Case("4x2048 offloaded", shape, checkpointing="offloaded"),
        Case("4x2048 full", shape),
        Case("4x2048 none", shape, checkpointing="none"),
        Case("4x2048 in 16 GiB", shape, checkpointing="auto", memory_gib=16),
        Case("4x2048 in 24 GiB", shape, checkpointing="auto", memory_gib=24),
        Case("4x512 full", shape, length=512),
        Case("4x512 none", shape, length=512, checkpointing="none"),
        ragged,
        Case(f"4x{mean} full", shape, length=mean),
        Case("1x8192 full", shape, rows=1, length=8192),
        Case("1x8192 of 27 documents, full", shape, rows=1, length=8192, documents=27),
        Case("4x4096, window 4096, full", windows, length=4096),
        Case("1x16384, window 4096, full", windows, rows=1, length=16384),
    ]
