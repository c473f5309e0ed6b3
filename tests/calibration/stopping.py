"""A calibration that is stopped on its way."""

from typing import Any

import pytest

from qsharded.calibration import calibrate
from qsharded.calibration.layer_store import LayerStore


def stop_at_the_second_layer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the second layer find no room to be kept, the first time; the layers that were kept or should have been."""
    put, layers = LayerStore.put, []

    def stopped_at_the_second(self: LayerStore, layer: int, *what: Any) -> None:
        layers.append(layer)
        if layers == [0, 1]:
            raise OSError("no room")
        put(self, layer, *what)

    monkeypatch.setattr(calibrate.LayerStore, "put", stopped_at_the_second)
    return layers
