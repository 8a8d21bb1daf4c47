"""Generating from an export keeps keys and values in FP8, rounded by its scales."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.exported import WEIGHTS, Made, edit_tensors
from helpers.nvfp4_formula import E4M3
from nemo_hybrid.commands.generate import GenerateOptions, generate_command
from nemo_hybrid.export.verify import load_exported
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model import attention as attention_module
from nemo_hybrid.model.attention import Attention
from nemo_hybrid.model.cache import AttentionCache, Reading

PLACE = "backbone.layers.2.mixer"
ROWS, TOKENS, FP8 = 2, 12, torch.float8_e4m3fn


def cast(x: Tensor, scale: float) -> Tensor:
    """The number of FP8 nearest to x over the scale, by a search among all of them in fp64."""
    wanted = x.double().numpy() / scale
    size = np.minimum(np.abs(wanted), E4M3[-1])
    above = np.clip(np.searchsorted(E4M3, size), 1, len(E4M3) - 1)
    below = above - 1
    up, down = E4M3[above] - size, size - E4M3[below]
    even = np.where(above % 2 == 0, above, below)
    nearest = np.where(up < down, above, np.where(down < up, below, even))
    return torch.from_numpy(np.sign(wanted) * E4M3[nearest] * scale).to(x)


def scale_of(directory: Path, letter: str) -> float:
    return float(load_file(directory / WEIGHTS)[f"{PLACE}.{letter}_proj.{letter}_scale"])


@pytest.fixture
def export(made: Made) -> Path:
    """Whose scales cover half of what keys and values reach."""
    directory = made("mixed")

    def halve(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(("k_scale", "v_scale")):
                tensors[name] = tensors[name] / 2

    edit_tensors(directory, halve)
    return directory


@contextmanager
def rounded(layer: Attention, scales: dict[str, float]) -> Iterator[None]:
    """Inside, the outputs of both projections are."""
    with ExitStack() as hooks:
        for letter, scale in scales.items():
            projection = getattr(layer, f"{letter}_proj")
            hook = projection.register_forward_hook(lambda _, __, y, s=scale: cast(y, s))
            hooks.callback(hook.remove)
        yield


@torch.no_grad()
def cached(layer: Attention, x_BSD: Tensor) -> tuple[Tensor, AttentionCache]:
    """What the layer makes of a text that it reads in a piece and then token by token."""
    cache, found, first = layer.new_cache(ROWS, TOKENS, x_BSD), [], TOKENS - 4
    before_B = torch.zeros(ROWS, dtype=torch.int64)
    found.append(layer.read(x_BSD[:, :first], cache, Reading(before_B, before_B, before_B))[0])
    for place in range(first, TOKENS):
        found.append(layer.decode(x_BSD[:, place], cache, before_B + place)[:, None])
    return torch.cat(found, 1), cache


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# In fp64, where no order of sums moves a number over a border between two of FP8; but what is
# rounded is divided in fp32, and so are the results multiplied.
SAME, OTHER = 1e-6, 1e-2


def test_cached_keys_and_values_are_those_of_an_independent_cast(export: Path) -> None:
    layer = load_exported(export).get_submodule(PLACE).double()
    assert isinstance(layer, Attention)
    x_BSD = torch.randn(ROWS, TOKENS, 32, generator=torch.Generator().manual_seed(1)).double()
    scales = {letter: scale_of(export, letter) for letter in "kv"}
    found_BSD, cache = cached(layer, x_BSD)
    with torch.no_grad(), rounded(layer, scales):
        assert off(found_BSD, layer(x_BSD)) < SAME
        largest = [layer.k_proj(x_BSD).abs().max(), layer.v_proj(x_BSD).abs().max()]
    assert largest == [pytest.approx(448 * s) for s in scales.values()]  # some were clipped
    assert cache.k_BTGP.dtype == cache.v_BTGP.dtype == FP8
    with torch.no_grad():
        assert off(found_BSD, layer(x_BSD)) > OTHER
        for wrong in ({"k": scales["v"], "v": scales["k"]}, {"k": scales["k"]},
                      {"v": scales["v"]}, {n: 2 * s for n, s in scales.items()}):  # fmt: skip
            with rounded(layer, wrong):
                assert off(found_BSD, layer(x_BSD)) > OTHER


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, scale: (x / scale).where(x.abs() <= 448 * scale, 0),
        lambda x, scale: (x * scale).clamp(-448, 448),
        lambda x, scale: (x / scale).clamp(-448, 448).to(torch.float8_e5m2),
    ],
)
def test_the_comparison_notices(export: Path, broken: Callable[[Tensor, float], Tensor]) -> None:
    layer = load_exported(export).get_submodule(PLACE).double()
    assert isinstance(layer, Attention)
    x_BSD = torch.randn(ROWS, TOKENS, 32, generator=torch.Generator().manual_seed(1)).double()
    with patch.object(attention_module, "_code", lambda x, s: broken(x, s).to(FP8)):
        found_BSD, _ = cached(layer, x_BSD)
    scales = {letter: scale_of(export, letter) for letter in "kv"}
    with torch.no_grad(), rounded(layer, scales):
        assert off(found_BSD, layer(x_BSD)) > OTHER


def test_generating_says_what_is_rounded(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, prompts = made("mixed"), tmp_path / "ids.jsonl"
    prompts.write_text(json.dumps({"input_ids": [5, 6, 7]}) + "\n")
    options = GenerateOptions(from_=str(directory), prompts=str(prompts), max_new_tokens=6)
    generate_command(options)
    said = capsys.readouterr()
    assert "is an export: its weights are dequantized" in said.err
    assert "keys and values are cached in FP8, by its scales" in said.err
    model = load_exported(directory).eval()
    (expected,) = Generator(model, 1).run([Request(0, [5, 6, 7], 6, stops={2})])
    assert said.out.split() == ["---", "0", *map(str, expected.said)]
    made("fp8")
    generate_command(options)
    assert "keys and values are not rounded\n" in capsys.readouterr().err
