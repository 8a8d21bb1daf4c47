"""The rows of the MoE benchmark: who takes part, what must come out, and what the hardware allows.

Byte and FLOP counts are lower bounds: every operand once from memory and every result once to it,
at 2 bytes per value; of experts without tokens no weights are read, but gradients are written. The
router's FLOP are those of its logits, as if they were products of bf16.

Shapes as in ``moe_problem``; R = T*K routed slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from measuring import TOLERANCE, UNUSABLE, CallFailed, Meter, deviation, kept_bytes
from moe_parts import Results, parts
from moe_peers import LAYERS, Layer, nemo_kernels_layer, on_path, transformers_config
from moe_problem import Problem

from nemo_kernels import moe
from nemo_kernels.moe import reference

SECONDS = {"cuda": 1.0, "cpu": 0.02}
"""For which each contender runs at least."""


@dataclass(frozen=True)
class Row:
    """One line of the table, before it is measured."""

    name: str
    ours: str
    builders: dict[str, Callable[[], Callable[[], Any]]]
    """For each contender what makes its call ready to run; may raise UNUSABLE."""
    expected: Callable[[], Results]
    """Results in fp32, from the PyTorch reference."""
    flops: float
    bytes: float
    results: Callable[[Any], Results] = lambda found: found
    """What of a call's return is compared with the expected results."""
    forward: dict[str, Callable[[], Layer]] = field(default_factory=dict)
    """Where a backward pass follows: each contender's forward pass, to see what it keeps."""
    leaves: Results = ()

    def limit_ms(self, limits: dict[str, float]) -> float:
        """No less time than this is possible at the measured copy and matrix-product speeds."""
        seconds = max(self.flops / limits["flops_per_s"], self.bytes / limits["bytes_per_s"])
        return seconds * 1e3


def rows(p: Problem, ours: str) -> Iterator[Row]:
    """The rows of one problem, the most important first. ``ours`` is a path of op moe."""
    yield _layer(p, ours, backward=True)
    yield _layer(p, ours, backward=False)
    if ours == "triton":
        yield from (Row(ours=ours, **part) for part in parts(p))
    yield _router(p, ours)


def _wide(p: Problem) -> Results:
    """x, routing weights and experts in fp32, as leaves of their own."""
    return tuple(t.detach().float().requires_grad_() for t in p.leaves)


def _layer(p: Problem, ours: str, backward: bool) -> Row:
    s = p.shape
    builders = {ours: partial(nemo_kernels_layer, ours), **LAYERS}
    forward = {name: partial(build, p) for name, build in builders.items()}

    def with_gradients(build: Callable[[], Layer]) -> Callable[[], Results]:
        layer = build()

        def call() -> Results:
            y_TL = layer()
            return y_TL, *torch.autograd.grad(y_TL, p.leaves, p.dy_TL)

        return call

    def without(build: Callable[[], Layer]) -> Callable[[], Results]:
        layer = torch.no_grad()(build())
        return lambda: (layer(),)

    def expected() -> Results:
        x_TL, weights_TK, up_EFL, down_ELF = leaves = _wide(p)
        with torch.set_grad_enabled(backward):
            inputs = (x_TL, p.ids_TK, weights_TK, up_EFL, down_ELF)
            y_TL = on_path("reference", lambda: moe.moe_mlp(*inputs))()
        grads = torch.autograd.grad(y_TL, leaves, p.dy_TL.float()) if backward else ()
        return y_TL.detach(), *grads

    kind, passes = (with_gradients, 3) if backward else (without, 1)
    expert, tokens = 4 * s.inner * s.width, 4 * s.tokens * s.width
    moved_experts = 2 * p.used() + s.experts if backward else p.used()
    return Row(
        name="MoE layer forward + backward" if backward else "MoE layer forward",
        ours=ours,
        builders={name: partial(kind, layer) for name, layer in forward.items()},
        expected=expected,
        flops=passes * 4 * s.slots * s.width * s.inner,
        bytes=moved_experts * expert + passes * tokens,
        forward=forward if backward else {},
        leaves=p.leaves,
    )  # fmt: skip


def _router(p: Problem, ours: str) -> Row:
    """Which of two experts with almost the same score is chosen is left to rounding, so the scores
    of the chosen are compared, and the weights, each in order of size."""
    s, arguments = p.shape, (p.hidden_TD, p.router_ED, p.bias_E, p.shape.k, p.scaling, True)

    @cache
    def scores() -> torch.Tensor:
        return reference.topk_router(*arguments)[2] + p.bias_E

    def router(name: str) -> Callable[[], Any]:
        return on_path(name, lambda: moe.topk_router(*arguments))

    def of_transformers() -> Callable[[], Any]:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

        config = transformers_config(p)
        config.hidden_size = s.hidden
        peer = NemotronHTopkRouter(config)
        peer.weight = torch.nn.Parameter(p.router_ED)
        peer.e_score_correction_bias = p.bias_E

        def call() -> Any:
            with torch.no_grad():
                _, weights_TK, ids_TK = peer(p.hidden_TD)
            return ids_TK, weights_TK

        return call

    def results(found: Any) -> Results:
        return scores().gather(1, found[0]).sort().values, found[1].sort().values

    return Row(
        name="router",
        ours=ours,
        builders={
            ours: partial(router, ours),
            "torch": partial(router, "reference"),
            "transformers": of_transformers,
        },
        expected=lambda: results(reference.topk_router(*arguments)),
        flops=2 * s.tokens * s.hidden * s.experts,
        bytes=2 * s.tokens * s.hidden + 2 * s.experts * s.hidden
        + 4 * s.tokens * s.experts + 12 * s.slots,
        results=results,
    )  # fmt: skip


def measure(row: Row, meter: Meter) -> dict[str, dict[str, Any]]:
    """What was found for each contender: times, deviation, memory; or why there is none, as
    ``{"unavailable": reason}``. A contender that fails, wherever, or whose results are wrong is not
    timed; the others are.

    Raises DeviceLost when the GPU can run nothing any more.
    """
    try:
        expected = row.expected()
    except UNUSABLE as error:
        reason = meter.reason(error)
        return {name: {"unavailable": f"no reference: {reason}"} for name in row.builders}
    found: dict[str, dict[str, Any]] = {}
    ready = {}
    for name, build in row.builders.items():
        try:
            call, results, seconds = meter.first(build)
            off = deviation(row.results(results), expected)
            del results
            if off > TOLERANCE:
                found[name] = {"unavailable": f"wrong: deviates by {off:.2g} (limit {TOLERANCE})"}
                continue
            about = {"deviation": off, "first_s": seconds, "peak_bytes": meter.peak_bytes(call)}
            if name in row.forward:
                about["kept_bytes"] = kept_bytes(row.forward[name](), row.leaves)
        except UNUSABLE as error:
            found[name] = {"unavailable": meter.reason(error)}
            continue
        found[name], ready[name] = about, call
    del expected
    while ready:
        try:
            times = meter.times(ready, seconds=SECONDS[meter.device] * len(ready))
        except CallFailed as failure:
            found[failure.name] = {"unavailable": failure.reason}
            del ready[failure.name]
        else:
            return {name: about | times.get(name, {}) for name, about in found.items()}
    return found
