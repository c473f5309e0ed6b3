"""Keys and values of the tokens already read. Axes: B batch, G key-value heads, S new tokens, T all, E head dim."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KVCache:
    """Room for `max_length` tokens a row in each of `num_layers` layers, allocated when a layer first writes."""

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._states: dict[int, tuple[Tensor, Tensor]] = {}
        self._documents_BT: Tensor | None = None
        self._fixed: tuple[Tensor, int] | None = None

    def state(self, layer: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What a layer that keeps a state instead of keys and values put here last."""
        return self._states.get(layer, (None, None))

    def set_state(self, layer: int, state: tuple[Tensor, Tensor]) -> None:
        """Put it here, in place of the one before."""
        self._states[layer] = state

    def reserve(self, tokens: int, documents_BS: Tensor | None) -> Tensor | None:
        """Check that `tokens` more fit and return the document ids of all tokens, those included.

        Raises ValueError where they do not fit, or where some calls give document ids and others do not.
        """
        if self.length + tokens > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens; {self.length} + {tokens} do not fit")
        if self.length:
            documents_BS = self._after_the_known(documents_BS)
        self._documents_BT = documents_BS
        return documents_BS

    def update(self, layer: int, keys_BGSE: Tensor, values_BGSE: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; return all of them, `[B, G, T, E]` each."""
        return self._append(self._keys, layer, keys_BGSE), self._append(self._values, layer, values_BGSE)

    @contextmanager
    def fixed(self, place_1: Tensor, keys: int) -> Iterator[None]:
        """Meanwhile layers store one token, at the place that an int64 tensor holds, and get ``keys`` keys and values:
        those behind that place are zeros. So a CUDA graph can be replayed as the text grows."""
        self._fixed = place_1, keys
        try:
            yield
        finally:
            self._fixed = None

    def advance(self, tokens: int) -> None:
        """Count `tokens` as read, once every layer has stored them."""
        self.length += tokens

    def _after_the_known(self, documents_BS: Tensor | None) -> Tensor | None:
        if (documents_BS is None) != (self._documents_BT is None):
            raise ValueError("document ids must come with every call on a cache, or with none")
        if documents_BS is None or self._documents_BT is None:
            return None
        return torch.cat((self._documents_BT, documents_BS), dim=1)

    def _append(self, store: list[Tensor | None], layer: int, new_BGSE: Tensor) -> Tensor:
        batch, heads, tokens, dim = new_BGSE.shape
        room = store[layer]
        if room is None:
            # zeros: what a mask hides must still be numbers
            room = store[layer] = new_BGSE.new_zeros(batch, heads, self.max_length, dim)
        if self._fixed is not None:
            place_1, keys = self._fixed
            return room.index_copy_(2, place_1, new_BGSE)[:, :, :keys]
        end = self.length + tokens
        room[:, :, self.length : end] = new_BGSE
        return room[:, :, :end]
