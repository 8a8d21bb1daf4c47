"""Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060) as the Nemotron-H family uses it.

Shapes: B batch, S sequence, D hidden, H heads, P head dim, I = H*P inner width, G groups,
N state, C = I + 2*G*N conv channels, K conv kernel, J = K - 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.cache import MambaCache, MambaState, Reading
from nemo_hybrid.model.fp32 import KeepsFp32
from nemo_hybrid.model.linear import Linear
from nemo_hybrid.model.norm import GatedRMSNorm
from nemo_hybrid.model.sequence import Sequences
from nemo_kernels.conv1d import causal_conv1d, causal_conv1d_step
from nemo_kernels.documents import Packing
from nemo_kernels.ssd import ssd_scan, ssd_step


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with SiLU; the weight in the checkpoint's layout [C, 1, K]."""

    def __init__(self, channels: int, kernel: int, sequence: Sequences) -> None:
        super().__init__()
        self.sequence = sequence
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_BSC: Tensor, documents: Packing) -> Tensor:
        return self.sequence.convolve(x_BSC, self.weight.squeeze(1), self.bias, documents)

    def read(self, x_BSC: Tensor, state_BCJ: Tensor, counts_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens that follow others: output, and the last J inputs up to each row's count."""
        x_BTC = torch.cat([state_BCJ.mT, x_BSC], dim=1)
        y_BTC = causal_conv1d(x_BTC, self.weight.squeeze(1), self.bias)
        return y_BTC[:, state_BCJ.shape[-1] :], self.last(x_BTC, counts_B)

    def last(self, x_BTC: Tensor, counts_B: Tensor) -> Tensor:
        """The last J inputs up to each row's count, of those with the J before them."""
        places_J = torch.arange(self.weight.shape[-1] - 1, device=x_BTC.device)
        return x_BTC.take_along_dim((counts_B[:, None] + places_J)[..., None], dim=1).mT

    def decode(self, x_BC: Tensor, state_BCJ: Tensor) -> Tensor:
        return causal_conv1d_step(x_BC, state_BCJ, self.weight.squeeze(1), self.bias)


class Mamba2(KeepsFp32):
    """in_proj -> (gate z | x, B, C through the convolution | dt) -> scan -> gated norm -> out_proj.

    ``A_log``, ``D`` and ``dt_bias`` stay fp32: a bf16 ulp is coarser than their updates.
    """

    def __init__(self, cfg: ModelConfig, sequence: Sequences) -> None:
        super().__init__()
        self.sequence = sequence
        self.heads, self.head_dim = cfg.mamba_num_heads, cfg.mamba_head_dim
        self.groups, self.state, self.chunk = cfg.n_groups, cfg.ssm_state_size, cfg.chunk_size
        inner = cfg.mamba_inner_size
        self.widths = (inner, cfg.conv_channels, self.heads)
        self.in_proj = Linear(cfg.hidden_size, sum(self.widths))
        self.conv1d = CausalConv1d(cfg.conv_channels, cfg.conv_kernel, sequence)
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(inner, cfg.layer_norm_epsilon, inner // cfg.n_groups)
        self.out_proj = Linear(inner, cfg.hidden_size)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z [.., I], conv input [.., C] and time step dt [.., H] (fp32) of x [.., D]."""
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        return z, xBC, F.softplus(dt.float() + self.dt_bias)

    def _operands(
        self, xBC: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the scan takes, in its order: x [.., H, P], dt, A, B and C [.., G, N], and D."""
        bc = self.groups * self.state
        x, B, C = xBC.split([self.widths[0], bc, bc], dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.groups, self.state)) for t in (B, C))
        return x, dt, -self.A_log.exp(), B, C, self.D

    def forward(self, x_BSD: Tensor, documents: Packing = None) -> Tensor:
        z_BSI, xBC_BSC, dt_BSH = self._project(x_BSD)
        operands = self._operands(self.conv1d(xBC_BSC, documents), dt_BSH)
        y_BSHP = self.sequence.scan(*operands, self.chunk, documents)
        return self.out_proj(self.norm(y_BSHP.flatten(-2), z_BSI))

    def new_cache(self, rows: int, tokens: int, like: Tensor) -> MambaCache:
        conv = (rows, self.conv1d.weight.shape[-1] - 1, self.widths[1])  # channels side by side
        ssm = (rows, self.heads, self.head_dim, self.state)
        wide = torch.promote_types(like.dtype, torch.float32)
        return MambaCache(like.new_zeros(conv).mT, like.new_zeros(ssm, dtype=wide))

    def read(self, x_BSD: Tensor, cache: MambaCache, reading: Reading) -> tuple[Tensor, MambaState]:
        """Tokens that follow what the cache holds, and what it is to hold after them."""
        z_BSI, raw_BSC, dt_BSH = self._project(x_BSD)
        xBC_BSC, conv_BCJ = self.conv1d.read(raw_BSC, cache.conv_BCJ, reading.counts_B)
        y_BSHP, ssm_BHPN = self._scan(xBC_BSC, dt_BSH, cache, reading)
        y_BSD = self.out_proj(self.norm(y_BSHP.flatten(-2), z_BSI))
        inputs = (raw_BSC, xBC_BSC, dt_BSH) if reading.revisable else None
        return y_BSD, MambaState(conv_BCJ, ssm_BHPN, inputs)

    def revise(self, state: MambaState, cache: MambaCache, reading: Reading) -> MambaState:
        """What the cache is to hold after other numbers of the tokens that were read."""
        assert state.inputs is not None, "this was not read to be revised"
        raw_BSC, xBC_BSC, dt_BSH = state.inputs
        raw_BTC = torch.cat([cache.conv_BCJ.mT, raw_BSC], dim=1)
        conv_BCJ = self.conv1d.last(raw_BTC, reading.counts_B)
        return MambaState(conv_BCJ, self._scan(xBC_BSC, dt_BSH, cache, reading)[1], None)

    def _scan(
        self, xBC_BSC: Tensor, dt_BSH: Tensor, cache: MambaCache, reading: Reading
    ) -> tuple[Tensor, Tensor]:
        """Outputs [B, S, H, P], and the state after the tokens that are real."""
        # A token of no time leaves the state as it is: so does what pads a row.
        dt_BSH = dt_BSH.masked_fill(~reading.real_BS[..., None], 0)
        operands = self._operands(xBC_BSC, dt_BSH)
        y_BSHP, ssm_BHPN = ssd_scan(*operands, self.chunk, None, cache.state())
        return y_BSHP, cache.stored(ssm_BHPN, reading.before_B + reading.counts_B)

    def decode(self, x_BD: Tensor, cache: MambaCache, before_B: Tensor) -> Tensor:
        z_BI, xBC_BC, dt_BH = self._project(x_BD)
        operands = self._operands(self.conv1d.decode(xBC_BC, cache.conv_BCJ), dt_BH)
        ssm_BHPN = cache.state()
        y_BHP = ssd_step(*operands, ssm_BHPN)
        cache.store(ssm_BHPN, before_B)
        return self.out_proj(self.norm(y_BHP.flatten(-2), z_BI))
