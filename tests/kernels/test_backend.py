"""Choice of paths: automatic, forced, missing, deviating."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import types

import pytest
import torch

from nemo_kernels import backend, norm
from nemo_kernels.documents import Documents

SMALL = backend.Sizes(4, 16, 2, 8, 16, 4, 2, 16, tokens=96)


@pytest.fixture(autouse=True)
def fresh_choices():
    yield
    backend.choose(**dict.fromkeys(backend.OPS, "auto"))
    backend._probe.cache_clear()
    backend._check.cache_clear()


@pytest.fixture
def library(monkeypatch):
    """A path of op norm whose module is made here; it claims to run on "cuda"."""

    def make(deviation):
        module = types.ModuleType("fake_norm_path")
        module.DEVICE_TYPES = ("cuda",)
        module.self_check = lambda device_type, sizes: deviation
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(norm, "PATHS", {"fake": module.__name__})
        backend._resolve.cache_clear()
        return module

    return make


def test_cpu_tensors_take_the_reference():
    rows = backend.report("cpu")
    assert [row[0] for row in rows] == list(backend.OPS)
    assert {row[1] for row in rows} == {"reference"}
    assert all(row[2] for row in rows)


def test_missing_libraries_are_named_in_the_reason():
    for op, library in (("ssd", "mamba_ssm"), ("conv1d", "causal_conv1d"),
                        ("attention", "flash_attn")):  # fmt: skip
        if importlib.util.find_spec(library) is None:
            path = backend.path(op, "cuda")
            assert path.name == "reference"
            assert f"No module named '{library}'" in path.reason
            with pytest.raises(ValueError, match=f"{library}.*cannot be used.*No module named"):
                backend.choose(**{op: library})


def test_a_library_that_agrees_is_taken_on_cuda_only(library):
    module = library(1e-3)
    assert backend.path("norm", "cuda").name == "fake"
    assert backend.implementation("norm", "cuda") is module
    assert backend.path("norm", "cpu").name == "reference"


@pytest.mark.parametrize("deviation", [0.5, float("nan")])
def test_a_library_that_deviates_is_not_taken(library, deviation):
    library(deviation)
    path = backend.path("norm", "cuda")
    assert path.name == "reference"
    assert "deviates" in path.reason


class CompilerError(Exception):
    """As Triton's are: of no type that others know."""


@pytest.mark.parametrize("error", [RuntimeError, CompilerError])
def test_a_library_that_fails_its_self_check_is_not_taken(library, error):
    module = library(0)

    def fail(device_type, sizes):
        raise error("no kernel image")

    module.self_check = fail
    assert "no kernel image" in backend.path("norm", "cuda").reason
    assert backend.path("norm", "cuda").name == "reference"


def test_a_self_check_does_not_see_what_its_caller_has_set(library):
    module = library(0)

    def check(device_type, sizes):
        x = torch.ones(3, requires_grad=True)
        (x * x).sum().backward()
        assert x.grad is not None
        assert not torch.is_autocast_enabled("cpu")
        return 0.0

    module.self_check = check
    with torch.inference_mode(), torch.autocast("cpu"):
        assert backend.path("norm", "cuda").name == "fake"


def test_self_checks_run_at_the_sizes_that_are_set(library):
    seen = []
    library(0).self_check = lambda *given: seen.append(given) or 0.0
    backend.check_at(SMALL)
    try:
        assert backend.report("cuda", ["norm"]) == [("norm", *backend.path("norm", "cuda"))]
    finally:
        backend.check_at(backend.Sizes())
    assert seen == [("cuda", SMALL)]


def test_a_forced_path_is_an_error_where_it_does_not_run(library):
    library(0)
    backend.choose(norm="fake")
    assert backend.path("norm", "cuda") == ("fake", "chosen")
    with pytest.raises(ValueError, match="does not run on cpu tensors"):
        norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    backend.choose(norm="reference")
    norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


def test_unknown_names_change_nothing():
    with pytest.raises(ValueError, match="no op 'scan'"):
        backend.choose(scan="auto")
    with pytest.raises(ValueError, match="no path 'tritn'; choose one of auto, reference"):
        backend.choose(norm="reference", conv1d="tritn")
    assert backend.path("norm", "cpu").reason == "CPU tensors"


def test_the_old_name_of_the_quantizer_stays():
    from nemo_kernels.lowp import reference
    from nemo_kernels.nvfp4.reference import quantize

    assert quantize is reference.quantize


def test_relative_deviation_sees_outputs_and_gradients():
    x = torch.randn(8, 4)

    def sine(t):
        return t.sin()

    def same_value_other_gradient(t):
        return t.sin().detach() + t - t.detach()

    run = lambda f, t: f(t)  # noqa: E731
    assert backend.relative_deviation(run, (sine, sine), (x,)) == 0
    assert backend.relative_deviation(run, (same_value_other_gradient, sine), (x,)) > 0.1
    assert backend.relative_deviation(run, (torch.cos, sine), (x,)) > 0.1


@pytest.mark.parametrize(
    ("op", "stand_in"),
    [
        ("conv1d", {"causal_conv1d": ("causal_conv1d_fn",)}),
        ("ssd", {"mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined",)}),
        ("attention", {"flash_attn": ("flash_attn_varlen_func",)}),
    ],
)
def test_wrappers_call_the_libraries_interfaces(op, stand_in, monkeypatch):
    """With stand-ins of the libraries' signatures, the wrappers' self-checks pass on the CPU."""
    (name, functions), *_ = stand_in.items()
    module = types.ModuleType(name)
    for function in functions:
        setattr(module, function, globals()["stand_in_" + function])
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"nemo_kernels.{op}.external", raising=False)
    external = importlib.import_module(f"nemo_kernels.{op}.external")
    del sys.modules[f"nemo_kernels.{op}.external"]  # not by monkeypatch, which would bring it back
    assert external.self_check("cpu", SMALL) <= backend.TOLERANCE


def stand_in_causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None,
):  # fmt: skip
    from nemo_kernels.conv1d.reference import causal_conv1d

    assert x.stride(1) == 1
    assert seq_idx.dtype == torch.int32
    assert seq_idx.is_contiguous()
    assert activation == "silu"
    return causal_conv1d(
        x.transpose(1, 2), weight, bias, Documents.from_numbers(seq_idx)
    ).transpose(1, 2)


def stand_in_mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    return_varlen_states=False, state_dtype=None,
):  # fmt: skip
    from nemo_kernels.ssd.reference import ssd_scan

    assert seq_idx.dtype == torch.int32
    assert return_final_states
    assert state_dtype == torch.float32
    return ssd_scan(x, dt, A, B, C, D, chunk_size, Documents.from_numbers(seq_idx), initial_states)


def stand_in_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False,
    deterministic=False,
):  # fmt: skip
    from nemo_kernels.attention.reference import attention

    assert causal
    bounds = cu_seqlens_q.tolist()
    assert cu_seqlens_k.tolist() == bounds
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= max_seqlen_q
    pieces = [
        attention(q[None, a:b], k[None, a:b], v[None, a:b])[0]
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(pieces)
