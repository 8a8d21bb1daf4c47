"""How the ops that mix a row's tokens are called in training.

Mixers call them through an object that is given to them as the dispatcher of experts is, so that
rows may be divided over processes (``nemo_hybrid.parallel.context``) and the model knows of none.

Shapes: B batch, S tokens of a row that are here, C conv channels, K conv kernel, H heads, P head
dim, G groups or key/value heads, N state.
"""

from typing import Protocol

from torch import Tensor

from nemo_kernels.attention import attention
from nemo_kernels.conv1d import causal_conv1d
from nemo_kernels.documents import Documents, Packing, Shard
from nemo_kernels.ssd import ssd_scan


class Sequences(Protocol):
    """What is handed down with a batch says whether its rows are whole: a `Shard` where not."""

    def convolve(
        self, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Packing
    ) -> Tensor:
        """See `nemo_kernels.conv1d.causal_conv1d`."""

    def scan(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        chunk_size: int,
        documents: Packing,
    ) -> Tensor:
        """The output of `nemo_kernels.ssd.ssd_scan`."""

    def attend(self, q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Packing) -> Tensor:
        """See `nemo_kernels.attention.attention`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the parts of the same rows; without gradient."""


class WholeSequences:
    """The ops themselves: all of every row is here."""

    def convolve(
        self, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Packing
    ) -> Tensor:
        return causal_conv1d(x_BSC, weight_CK, bias_C, whole(documents))

    def scan(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        chunk_size: int,
        documents: Packing,
    ) -> Tensor:
        inputs = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
        return ssd_scan(*inputs, chunk_size, whole(documents))[0]

    def attend(self, q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Packing) -> Tensor:
        return attention(q_BSHP, k_BSGP, v_BSGP, whole(documents))

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def whole(documents: Packing) -> Documents | None:
    """Of rows that are not divided."""
    assert not isinstance(documents, Shard), "the model was not told how rows are divided"
    return documents
