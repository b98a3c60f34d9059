"""How fast a product with few rows can be: its bytes at the device's copy bandwidth, and the cost of one launch.

    time = launch + bytes / bandwidth,    ceiling of the speed-up = time of the dense weight / time of the packed one

For many rows arithmetic decides, and this roof says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmprune_kernels.benchmark.shapes import BYTES, Layer
from llmprune_kernels.decode import ROWS

SHARE = {"dense": 1.0, "2:4": 9 / 16, "bitmap": 1 / 2 + 37 / 512}
"""Of the dense 16-bit bytes. The bitmap at half the weights, with records of 37 words for 4 rows of 256 inputs."""
FEW_ROWS = ROWS  # for which bytes decide


@dataclass(frozen=True)
class Roof:
    """A device.

    Attributes:
        bandwidth: bytes per second, read and written, of a copy inside its memory.
        launch: microseconds that an empty kernel takes in a CUDA graph.
    """

    bandwidth: float
    launch: float

    def microseconds(self, layer: Layer, form: str, rows: int) -> float:
        """The least time for x [rows, inputs] times a weight of `form`, a name in SHARE."""
        return self.launch + 1e6 * traffic(layer, form, rows) / self.bandwidth

    def ceiling(self, layer: Layer, form: str, rows: int) -> float:
        """How many times as fast as the dense weight a weight of `form` can be."""
        return self.microseconds(layer, "dense", rows) / self.microseconds(layer, form, rows)


def weight_bytes(layer: Layer, form: str) -> float:
    """Bytes of the weight."""
    return layer.outputs * layer.inputs * BYTES * SHARE[form]


def traffic(layer: Layer, form: str, rows: int) -> float:
    """Bytes that a product must move: the weight and x read, y written."""
    return weight_bytes(layer, form) + rows * (layer.inputs + layer.outputs) * BYTES
