"""Seeds for stochastic rounding: another one for every tensor that is rounded in a run."""

import hashlib


class Streams:
    """Keys by (seed, rank, batch, micro-batch, layer, use, operand), so that a resumed run draws
    what one that never stopped would draw.

    Only gradients are rounded stochastically, and the backward pass of a layer's use happens once,
    whether its activations are recomputed or not. So uses are counted there.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._run = seed, rank
        self.start(0, 0)

    def start(self, batch: int, micro_batch: int) -> None:
        """Everything from here on belongs to this micro-batch of this global batch."""
        self._at = batch, micro_batch
        self._uses: dict[str, int] = {}

    def next_use(self, layer: str) -> tuple[object, ...]:
        """What to give to :meth:`seed` during one backward pass of a layer."""
        use = self._uses[layer] = self._uses.get(layer, -1) + 1
        return (*self._run, *self._at, use, layer)

    @staticmethod
    def seed(use: tuple[object, ...], operand: str) -> int:
        """64 bits for one operand, as a signed number."""
        digest = hashlib.blake2b(repr((*use, operand)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
