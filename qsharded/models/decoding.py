"""Decoding steps by CUDA graphs: what a token takes hundreds of launches for is captured once and replayed.

A graph does the same work on the same memory every time. So a step reads tokens, positions and the place where its keys
go from tensors, advances them itself, and attends to a fixed number of keys, of which a mask hides those to come; when
these are full, a wider graph is captured. The host is one step behind: it reads a step's tokens while the next runs.

Axes: B batch, T keys, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsharded.models.attention import has_outside_attention
from qsharded.models.attention_inputs import StepInputs
from qsharded.models.config import ModelConfig
from qsharded.models.decoder import CausalLM
from qsharded.models.kv_cache import KVCache
from qsharded.models.sampling import Sampling
from qsharded.utils import collectives

# not cuDNN, which plans each shape anew, and would do so within a capture
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KEYS_AT_ONCE = 256  # by which a graph's keys grow: a graph takes as long to capture as a step or two


def can_replay(model: CausalLM) -> bool:
    """Whether graphs serve: on one GPU that holds the whole model, of our own code, without states or other things that
    are decided on the host as the text grows."""
    whole = type(model) is CausalLM and collectives.every_rank() is None  # FSDP2 makes a subclass of it
    return whole and _is_steady(model.config) and not has_outside_attention() and _captures_on(model)


def _is_steady(config: ModelConfig) -> bool:
    ropes = {rope.rope_type for rope in config.rope_of_layer if rope is not None}
    steady = config.linear is None and config.mixture is None and config.score_softcap is None
    return steady and not ropes & {"dynamic", "longrope"}


def _captures_on(model: CausalLM) -> bool:
    return all(parameter.is_cuda for parameter in model.parameters())


class GraphDecoding:
    """Steps of a batch whose prompts are in ``cache``.

    Args:
        next_B: the tokens that follow the prompts.
        position_B1: of each prompt's last token.
        gaps_B1: how many keys of padding each row begins with; None: none.
        noise_BV: memory for ``sampling``'s noise, or None.
        generator: of that noise, on the model's device.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        next_B: Tensor,
        position_B1: Tensor,
        gaps_B1: Tensor | None,
        sampling: Sampling,
        noise_BV: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self._model, self._cache = model, cache
        self._sampling, self._noise_BV, self._generator = sampling, noise_BV, generator
        self._token_B1, self._position_B1 = next_B[:, None].clone(), position_B1 + 1
        self._place_1 = torch.full((1,), cache.length, device=next_B.device)
        self._next_B = next_B.clone()
        self._inputs = StepInputs(model.config, model.model.dtype, cache.max_length, next_B.device, gaps_B1)
        self._keys = 0
        self._replay: Callable[[], None] | None = None

    def tokens(self, steps: int) -> Iterator[list[int]]:
        """Of each of so many steps, the row's tokens."""
        waiting = None
        for _ in range(steps):
            self._advance()
            launched = _OnHost(self._next_B)
            if waiting is not None:
                yield waiting.tokens()
            waiting = launched
        if waiting is not None:
            yield waiting.tokens()

    def _advance(self) -> None:
        """Launch a step: the first as it is written, which compiles and allocates what a capture could not."""
        if self._noise_BV is not None:
            self._noise_BV.exponential_(generator=self._generator)
        keys = min(-(-(self._cache.length + 1) // KEYS_AT_ONCE) * KEYS_AT_ONCE, self._cache.max_length)
        if self._keys == 0:
            self._keys = keys
            self._step()
        else:
            if self._replay is None or keys > self._keys:
                self._keys = keys
                self._replay = captured(self._step)
            self._replay()
        self._cache.advance(1)

    def _step(self) -> None:
        inputs = self._inputs.at(self._position_B1, self._place_1, self._keys)
        with self._cache.fixed(self._place_1, self._keys), sdpa_kernel(_BACKENDS):
            logits_B1V = self._model.step(self._token_B1, inputs, self._cache)
        self._next_B.copy_(self._sampling.choose(logits_B1V[:, -1], self._noise_BV))
        self._token_B1.copy_(self._next_B.clamp(min=0)[:, None])
        self._position_B1 += 1
        self._place_1 += 1


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """What replays ``step``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class _OnHost:
    """Tokens on their way to the host."""

    def __init__(self, token_B: Tensor) -> None:
        self._token_B = torch.empty(token_B.shape, dtype=token_B.dtype, pin_memory=token_B.is_cuda)
        self._token_B.copy_(token_B, non_blocking=True)
        self._arrived = torch.cuda.Event() if token_B.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def tokens(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._token_B.tolist()
