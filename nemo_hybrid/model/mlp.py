"""Dense feed-forward layers with a squared ReLU (So et al. 2021, arXiv 2109.08668)."""

import torch.nn.functional as F
from torch import Tensor, nn

from nemo_hybrid.model.cache import Reading
from nemo_hybrid.model.linear import Linear
from nemo_kernels.documents import Packing, Tile


class MLP(nn.Module):
    """down(relu(up(x))^2): not gated, no biases. [.., D] -> [.., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor, documents: Packing | Tile = None) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> None:
        """A token needs none but itself."""

    def read(self, x_BSD: Tensor, cache: None, reading: Reading) -> tuple[Tensor, None]:
        return self(x_BSD), None

    def decode(self, x_BD: Tensor, cache: None, before_B: Tensor) -> Tensor:
        return self(x_BD)
