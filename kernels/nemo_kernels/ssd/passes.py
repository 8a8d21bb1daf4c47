"""The passes over memory between the products of the chunked scan, a launch each.

Shapes: as in ``chunk_kernel.py``. Tensors by chunk are contiguous; those of the caller, [B,S,...],
have heads (or groups) side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nemo_kernels.launch import launch
from nemo_kernels.ssd import chunk_kernel as kernels

_ROWS = 32  # tokens of a tile
_BLOCK = 1024  # elements of a state
_OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 3}


class Times(NamedTuple):
    """Decays, fp32 [U,H,L]; ``gate`` [U,H]."""

    cs: Tensor
    dt: Tensor
    from_start: Tensor
    to_end: Tensor
    gate: Tensor


class Passes(NamedTuple):
    """Of a scan with these sizes; operands are of ``dtype``."""

    rows: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state: int
    chunk: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(x_BSHP: Tensor, B_BSGN: Tensor, chunk: int) -> Passes:
        rows, length, heads, head_dim = x_BSHP.shape
        groups, state = B_BSGN.shape[2:]
        sizes = (rows, length, heads, head_dim, groups, state, chunk)
        return Passes(*sizes, x_BSHP.dtype, x_BSHP.device)

    @property
    def chunks(self) -> int:
        """Of a row."""
        return triton.cdiv(self.length, self.chunk)

    @property
    def blocks(self) -> int:
        """Tiles of a chunk's tokens."""
        return triton.cdiv(self.chunk, _ROWS)

    @property
    def tiles(self) -> int:
        """Tiles of a head's state."""
        return triton.cdiv(self.head_dim * self.state, _BLOCK)

    @property
    def shape_UH(self) -> tuple[int, int]:
        return self.rows * self.chunks, self.heads

    @property
    def shape_UHLP(self) -> tuple[int, ...]:
        return *self.shape_UH, self.chunk, self.head_dim

    @property
    def shape_UGLN(self) -> tuple[int, ...]:
        return self.shape_UH[0], self.groups, self.chunk, self.state

    @property
    def shape_BcHPN(self) -> tuple[int, ...]:
        return self.rows, self.chunks, self.heads, self.head_dim, self.state

    def _sums(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _operand(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _beside(self) -> Tensor:
        """[U,G,L,hP]: the heads of a group side by side, as products with states want them."""
        u, _, chunk, head_dim = self.shape_UHLP
        return self._operand(u, self.groups, chunk, self.heads // self.groups * head_dim)

    def _pairs(self) -> Tensor:
        """[2,U,G,L,N]: B and C."""
        return self._operand(2, *self.shape_UGLN)

    def _tile(self, width: int | None = None) -> tuple[int, ...]:
        """Constants of kernels: chunk, tokens of a tile, and columns for so many numbers."""
        tile = (self.chunk, min(_ROWS, self.chunk))
        return tile if width is None else (*tile, padded(width))

    def _launch(self, kernel: Any, each: int, *arguments: Any, moved: int | None = None) -> None:
        """``each``: programs per chunk."""
        launch(kernel, (self.shape_UH[0] * each,), *arguments, moved=moved, **_OPTIONS)

    def by_group(self, states_BcHPN: Tensor) -> Tensor:
        """[U,G,hP,N]."""
        folded = self.heads // self.groups * self.head_dim
        return states_BcHPN.view(self.shape_UH[0], self.groups, folded, self.state)

    def times(self, dt_BSH: Tensor, A_H: Tensor, seq_idx_BS: Tensor | None) -> Times:
        shape = (*self.shape_UH, self.chunk)
        cs, dt, from_start, to_end = (self._sums(*shape) for _ in range(4))
        times = Times(cs, dt, from_start, to_end, self._sums(*self.shape_UH))
        sizes = (self.length, self.heads, self.chunks, *dt_BSH.stride(), self.chunk)
        self._launch(kernels.times_kernel, self.heads, dt_BSH, A_H, seq_idx_BS, *times, *sizes)
        return times

    def for_output(
        self, x_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, times: Times
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [U,H,L,P]; as it is written to states [U,G,L,hP]; B and C [2,U,G,L,N]."""
        results = (self._operand(*self.shape_UHLP), self._beside(), self._pairs())
        x_UHLP, written_UGLhP, BC_2UGLN = results
        given, factors = (x_BSHP, None, B_BSGN, C_BSGN), (times.dt, times.to_end)
        self._lay_out(given, factors, (x_UHLP, None, written_UGLhP, BC_2UGLN))
        return results

    def for_gradients(
        self, x_BSHP: Tensor, dy_BSHP: Tensor, B_BSGN: Tensor, C_BSGN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x and dy [U,H,L,P]; B and C [2,U,G,L,N]."""
        x_UHLP, dy_UHLP = self._operand(*self.shape_UHLP), self._operand(*self.shape_UHLP)
        BC_2UGLN = self._pairs()
        given, results = (x_BSHP, dy_BSHP, B_BSGN, C_BSGN), (x_UHLP, dy_UHLP, None, BC_2UGLN)
        self._lay_out(given, (None, None), results)
        return x_UHLP, dy_UHLP, BC_2UGLN

    def written(self, x_BSHP: Tensor, times: Times) -> Tensor:
        """x as it is written to states, [U,G,L,hP]."""
        written_UGLhP = self._beside()
        results = (None, None, written_UGLhP, None)
        self._lay_out((x_BSHP, None, None, None), (times.dt, times.to_end), results)
        return written_UGLhP

    def read(self, dy_BSHP: Tensor, across_UGLhP: Tensor, times: Times) -> tuple[Tensor, Tensor]:
        """dy as it reads from states, [U,G,L,hP]; what cs gets for that, [U,H,L]."""
        results = (self._beside(), torch.empty_like(times.cs))
        self._launch(
            kernels.read_kernel, self.heads * self.blocks, dy_BSHP, times.from_start, across_UGLhP,
            *results, *self._sizes(), *dy_BSHP.stride()[:2], *self._tile(self.head_dim),
        )  # fmt: skip
        return results

    def _lay_out(
        self,
        given: tuple[Tensor | None, ...],
        factors: tuple[Tensor | None, ...],
        results: tuple[Tensor | None, ...],
    ) -> None:
        of_heads = self.heads * self.blocks
        each = of_heads + (self.groups * self.blocks if results[-1] is not None else 0)
        halves = 0 if results[-1] is None else results[-1][0].numel()
        sizes = (halves, of_heads * self.shape_UH[0], self.length, self.heads, self.groups)
        strides = [n for t in given for n in ((0, 0) if t is None else t.stride()[:2])]
        tile = (*self._tile(self.head_dim), padded(self.state))
        self._launch(
            kernels.layout_kernel, each, *given, *factors, *results,
            *sizes, self.head_dim, self.state, self.chunks, *strides, *tile,
        )  # fmt: skip

    def matrix(self, scores_UGLL: Tensor, times: Times, seq_idx_BS: Tensor | None) -> Tensor:
        """M [U,H,L,L], without D."""
        M_UHLL = self._operand(*self.shape_UH, self.chunk, self.chunk)
        given = (times.cs, times.dt, seq_idx_BS, M_UHLL)
        sizes = (self.length, self.heads, self.groups, self.chunks)
        moved = self._causal(scores_UGLL) + _bytes(*given)
        each = self.heads * self.blocks
        kernel, tile = kernels.matrix_kernel, self._tile()
        self._launch(kernel, each, scores_UGLL, *given, *sizes, *tile, moved=moved)
        return M_UHLL

    def states(
        self, new_UGhPN: Tensor, gate_UH: Tensor, initial_BHPN: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Those that enter chunks, rounded, [B,c,H,P,N]; the last one [B,H,P,N]."""
        states_BcHPN = self._operand(*self.shape_BcHPN)
        final_BHPN = self._sums(self.rows, *self.shape_BcHPN[2:])
        tensors = (new_UGhPN, initial_BHPN, gate_UH, states_BcHPN, final_BHPN)
        self._over_states(kernels.state_kernel, *tensors)
        return states_BcHPN, final_BHPN

    def state_gradients(
        self,
        dread_UGhPN: Tensor,
        states_BcHPN: Tensor,
        gate_UH: Tensor,
        dfinal_BHPN: Tensor | None,
        initial: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the states after chunks, rounded, of gates by tiles, and, if asked for, of the first
        state."""
        dafter_BcHPN = torch.empty_like(states_BcHPN)
        dgate_UHT = self._sums(*self.shape_UH, self.tiles)
        dinitial_BHPN = self._sums(self.rows, *self.shape_BcHPN[2:]) if initial else None
        given = (dread_UGhPN, states_BcHPN, dfinal_BHPN, gate_UH)
        results = (dafter_BcHPN, dgate_UHT, dinitial_BHPN)
        self._over_states(kernels.state_gradient_kernel, *given, *results)
        return results

    def _over_states(self, kernel: Any, *tensors: Tensor | None) -> None:
        grid = (self.rows * self.heads * self.tiles,)
        sizes = (self.chunks, self.heads, self.head_dim * self.state, _BLOCK)
        launch(kernel, grid, *tensors, *sizes, **_OPTIONS)

    def output(
        self, within_UHLP: Tensor, across_UGLhP: Tensor, x_BSHP: Tensor, times: Times, D_H: Tensor
    ) -> Tensor:
        """y [B,S,H,P]."""
        y_BSHP = self._operand(*x_BSHP.shape)
        tensors = (within_UHLP, across_UGLhP, x_BSHP, times.from_start, D_H, y_BSHP)
        self._launch(
            kernels.output_kernel, self.heads * self.blocks, *tensors, *self._sizes(),
            *x_BSHP.stride()[:2], y_BSHP.stride(0), *self._tile(self.head_dim),
        )  # fmt: skip
        return y_BSHP

    def score_gradients(
        self, dM_UHLL: Tensor, scores_UGLL: Tensor, times: Times, seq_idx_BS: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of C B^T and of its transpose, rounded, [2,U,G,L,L]; sums over rows [U,H,L], and over the
        columns of tiles [R,U,H,L]."""
        dscores_2UGLL = self._operand(2, *scores_UGLL.shape)
        row_UHL = torch.empty_like(times.cs)
        column_RUHL = self._sums(self.blocks, *row_UHL.shape)
        others = (times.cs, times.dt, seq_idx_BS, dscores_2UGLL, row_UHL, column_RUHL)
        sizes = (scores_UGLL.numel(), row_UHL.numel(), *self._sizes()[:3], self.chunks)
        self._launch(
            kernels.score_gradient_kernel, self.groups * self.blocks, dM_UHLL, scores_UGLL,
            *others, *sizes, *self._tile(),
            moved=self._causal(dM_UHLL) + self._causal(scores_UGLL) + _bytes(*others),
        )  # fmt: skip
        return dscores_2UGLL, row_UHL, column_RUHL

    def group_gradients(
        self, pairs_2UGLN: Tensor, dC_UGLN: Tensor, dB_UGLN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of C and B, [B,S,G,N], each of two parts."""
        shape = (self.rows, self.length, self.groups, self.state)
        dC_BSGN, dB_BSGN = self._operand(*shape), self._operand(*shape)
        tensors = (pairs_2UGLN, dC_UGLN, dB_UGLN, dC_BSGN, dB_BSGN)
        sizes = (dC_UGLN.numel(), self.length, self.groups, self.state, self.chunks)
        self._launch(
            kernels.group_gradient_kernel, self.groups * self.blocks, *tensors, *sizes,
            dC_BSGN.stride(0), *self._tile(self.state),
        )  # fmt: skip
        return dC_BSGN, dB_BSGN

    def input_gradients(
        self, within_UHLP: Tensor, across_UGLhP: Tensor, x_BSHP: Tensor, dy_BSHP: Tensor,
        times: Times, D_H: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dx [B,S,H,P]; what dt and cs get for writing to states [U,H,L]; dD by tiles [U,H,R]."""
        dx_BSHP, dwritten_UHL = self._operand(*x_BSHP.shape), torch.empty_like(times.cs)
        results = (dx_BSHP, dwritten_UHL, self._sums(*self.shape_UH, self.blocks))
        given = (within_UHLP, across_UGLhP, x_BSHP, dy_BSHP, times.dt, times.to_end, D_H)
        strides = (*x_BSHP.stride()[:2], *dy_BSHP.stride()[:2], dx_BSHP.stride(0))
        self._launch(
            kernels.input_gradient_kernel, self.heads * self.blocks, *given, *results,
            *self._sizes(), *strides, *self._tile(self.head_dim),
        )  # fmt: skip
        return results

    def time_gradients(
        self, sums: tuple[Tensor, ...], times: Times, dt_BSH: Tensor, A_H: Tensor,
        seq_idx_BS: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of dt [B,S,H], and of A and D by chunks [2,U,H]. ``sums``: of rows, of columns, for
        writing, for reading, of gates, of D."""
        ddt_BSH = torch.empty(dt_BSH.shape, dtype=dt_BSH.dtype, device=self.device)
        sums_2UH = self._sums(2, *self.shape_UH)
        tensors = (*sums, times.dt, A_H, times.gate, seq_idx_BS, ddt_BSH, sums_2UH)
        sizes = (times.dt.numel(), times.gate.numel(), self.length, self.heads, self.chunks)
        tile = (self.tiles, self.chunk, self.blocks, triton.next_power_of_2(self.tiles))
        self._launch(kernels.time_gradient_kernel, self.heads, *tensors, *sizes, *tile)
        return ddt_BSH, sums_2UH

    def _sizes(self) -> tuple[int, ...]:
        return self.length, self.heads, self.groups, self.head_dim, self.chunks

    def _causal(self, pairs: Tensor) -> int:
        """Bytes of [.., L, L] without what lies above the diagonal, which is not read."""
        return pairs.nbytes // (2 * self.chunk) * (self.chunk + 1)


def padded(width: int) -> int:
    """Columns of a tile. With 16 or more of either, a thread has no copy of another's numbers."""
    return max(16, triton.next_power_of_2(width))


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
