"""config.json of the Hugging Face ``nemotron_h`` model type, read and written.

Field names and their meaning when absent are those of transformers'
``models/nemotron_h/configuration_nemotron_h.py``. Two things differ on disk:

- Layers are written as pattern strings (``hybrid_override_pattern``), which every reader knows;
  lists (``layers_block_type``) are read in the old and the new vocabulary.
- Serving engines require ``num_nextn_predict_layers`` 1, because one physical block is applied
  repeatedly. The number of depths travels in ``mtp_num_depths``, a field of ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED
from nemo_hybrid.config.model import LAYER_NAMES, ModelConfig, check_pattern
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json

DEFAULT_MTP_DEPTHS = 2  # what the released models were trained with

# What a field means when config.json lacks it. Fields not listed here must be present when the
# pattern uses them (_NEEDED).
_ABSENT = {
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "time_step_min": 1e-3,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_latent_size": None,
    "moe_shared_expert_intermediate_size": 7688,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_NEEDED = {
    "": ("vocab_size", "hidden_size"),
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
    "E": (
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size",),
}
# Second names of a field: from other converters, and from transformers' own attribute map.
_ALIASES = {
    "norm_eps": "layer_norm_epsilon",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "torch_dtype": "dtype",
}
# Fields with one supported value (absent means that value), written as they stand here.
_FIXED: dict[str, Any] = {
    "model_type": "nemotron_h",
    "tie_word_embeddings": False,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "n_group": 1,
    "topk_group": 1,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sliding_window": None,
}
# Fields that may be 0, absent or 1, and what 1 means.
_ONE_OR_NONE = {
    "num_nextn_predict_layers": "one physical block, applied mtp_num_depths times",
    "n_shared_experts": "moe_shared_expert_intermediate_size is its whole width",
}
_LARGEST = 2**30  # of any whole number: widths, which are products of two, fit into 64 bits
_MOST = {"n_routed_experts": 2**16}
_MOST_LAYERS = 2**12
_MOST_DEPTHS = 2**10
_INFINITY = {"__float__": "Infinity"}  # how transformers writes it


@dataclass(config=CHECKED)
class HybridConfig(ModelConfig):
    """The configuration a :class:`nemo_hybrid.HybridLM` is built from."""

    @classmethod
    def from_hf(cls, path: str | Path) -> HybridConfig:
        """Read config.json (or the directory that holds it). Raises UserError, naming fields."""
        return read_config(path)

    def to_hf(self) -> dict[str, Any]:
        """The contents of config.json for transformers and serving engines."""
        return config_json(self)


def _plain_fields() -> list[str]:
    """Fields that mean the same here and there."""
    patterns = ("pattern", "mtp_pattern", "mtp_num_depths")
    return [f.name for f in fields(ModelConfig) if f.name not in patterns]


def config_json(cfg: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a checkpoint whose weights are stored in dtype, as strict JSON values.

    A model without shared expert is written with size 0; transformers cannot build that one.
    """
    out: dict[str, Any] = {"architectures": ["NemotronHForCausalLM"], **_FIXED}
    out |= {name: getattr(cfg, name) for name in _plain_fields()}
    out |= {
        "hybrid_override_pattern": cfg.pattern,
        "num_hidden_layers": cfg.num_hidden_layers,
        "n_shared_experts": int(cfg.moe_shared_expert_intermediate_size > 0),
        "num_nextn_predict_layers": int(cfg.mtp_num_depths > 0),
        "expand": 2,  # nothing reads it, but released configurations carry it
        "mamba_ssm_cache_dtype": "float32",
        "moe_shared_expert_overlap": False,
        "rescale_prenorm_residual": True,
        "residual_in_fp32": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if cfg.mtp_num_depths:
        out["mtp_hybrid_override_pattern"] = cfg.mtp_pattern
        out["mtp_num_depths"] = cfg.mtp_num_depths
    return out


def read_config(source: str | Path | Mapping[str, Any], where: str = "config.json") -> HybridConfig:
    """Read a configuration from a config.json, the directory that holds one, or its contents
    (``where`` says in messages where those stand).

    Raises UserError naming the field for values that this model family's code does not support
    and for fields that contradict each other.
    """
    if isinstance(source, Mapping):
        raw = source
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        where, raw = str(path), read_json(path)
    with blaming(where):
        return _read(_without_aliases(raw))


@contextmanager
def blaming(where: str) -> Iterator[None]:
    """Say in front of a UserError's message where the mistake stands."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _read(raw: dict[str, Any]) -> HybridConfig:
    _check_supported(raw)
    pattern = _pattern(raw, "hybrid_override_pattern", "layers_block_type")
    if pattern is None:
        raise UserError("hybrid_override_pattern (or layers_block_type) is missing")
    check_pattern(pattern, "hybrid_override_pattern")
    layers = raw.get("num_hidden_layers")
    if layers is not None and (type(layers) is not int or layers != len(pattern)):
        raise UserError(
            f"num_hidden_layers is {layers!r}, but the pattern {pattern} has {len(pattern)} layers"
        )
    depths, mtp_pattern = _mtp(raw)
    values: dict[str, Any] = {"pattern": pattern, "mtp_num_depths": depths}
    if depths:
        values["mtp_pattern"] = mtp_pattern
    _check_needed(raw, {"", *pattern, *(mtp_pattern if depths else "")})
    several: list[int] = []
    for name in _plain_fields():
        value = _ABSENT.get(name) if raw.get(name) is None else raw[name]
        if name == "eos_token_id" and isinstance(value, list):
            several = eos_token_ids(value)
            value = several[0]  # checkpoint.companions carries the list
        most = _MOST.get(name, _LARGEST)
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{name} is {str(value)[:24]}, at most {most} is supported")
        values[name] = value
    cfg = HybridConfig(**values)
    cfg.validate()
    if max(several, default=0) >= cfg.vocab_size:
        raise UserError(f"eos_token_id is {several}, vocab_size is {cfg.vocab_size}")
    return cfg


def _without_aliases(raw: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(raw)
    for alias, name in _ALIASES.items():
        value = out.pop(alias, None)
        if value is None:
            continue
        if out.get(name) is not None and out[name] != value:
            raise UserError(f"{alias} is {value!r}, but {name} is {out[name]!r}")
        out[name] = value
    return out


def _check_supported(raw: Mapping[str, Any]) -> None:
    """Refuse what the model family's code can compute and ours cannot."""
    if raw.get("model_type") is None:
        raise UserError("model_type is missing; expected 'nemotron_h'")
    if raw.get("quantization_config") is not None:
        raise UserError(
            "quantization_config is set; only unquantized checkpoints can be read (exports by "
            "verify-export, generate, rollout, eval-mtp and harness)"
        )
    for name, only in _FIXED.items():
        value = only if raw.get(name) is None else raw[name]
        # 1 == True in Python; in JSON they are different mistakes.
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            raise UserError(f"{name} is {value!r}; only {only!r} is supported")
    limit = raw.get("time_step_limit")
    limits = [math.inf if v == _INFINITY else v for v in _as_list(limit)]
    if limit is not None and limits != [0, math.inf]:
        raise UserError(
            f"time_step_limit is {limit!r}; only (0, infinity) is supported: time steps are not "
            "clamped"
        )


def _check_needed(raw: dict[str, Any], used: set[str]) -> None:
    """Refuse a configuration without a field that its layers (letters) need."""
    for letter, names in _NEEDED.items():
        missing = [name for name in names if letter in used and raw.get(name) is None]
        if missing == ["num_key_value_heads"]:
            raw["num_key_value_heads"] = raw["num_attention_heads"]
        elif missing:
            raise UserError(f"{', '.join(missing)} is missing")
    if "E" in used and raw.get("n_shared_experts") is not None:
        count, size = _one_or_none(raw, "n_shared_experts"), "moe_shared_expert_intermediate_size"
        if bool(count) != bool(raw[size]):
            raise UserError(f"n_shared_experts is {count}, but {size} is {raw[size]}")


def _one_or_none(raw: Mapping[str, Any], name: str) -> int:
    count = 0 if raw.get(name) is None else raw[name]
    if type(count) is not int or count not in (0, 1):
        raise UserError(f"{name} is {count!r}; only 1 is supported: {_ONE_OR_NONE[name]}")
    return count


def _mtp(raw: Mapping[str, Any]) -> tuple[int, str]:
    """Number of depths and pattern of the multi-token-prediction block.

    Without the block, a list of its layers stays unused: transformers writes one into every
    config.json. A pattern string it writes into none.
    """
    blocks = _one_or_none(raw, "num_nextn_predict_layers")
    pattern = _pattern(raw, "mtp_hybrid_override_pattern", "mtp_layers_block_type")
    if not blocks:
        for name in ("mtp_num_depths", "mtp_hybrid_override_pattern"):
            if raw.get(name):
                raise UserError(
                    f"{name} is {raw[name]!r}, but num_nextn_predict_layers is 0 or absent"
                )
        return 0, ""
    depths = DEFAULT_MTP_DEPTHS if raw.get("mtp_num_depths") is None else raw["mtp_num_depths"]
    if type(depths) is not int or not 1 <= depths <= _MOST_DEPTHS:
        raise UserError(
            f"mtp_num_depths must be a whole number from 1 to {_MOST_DEPTHS}, got {depths!r}"
        )
    return depths, "*E" if pattern is None else pattern


def _pattern(raw: Mapping[str, Any], text: str, names: str) -> str | None:
    """The layer letters from a pattern string, a list of layer names, or both if they agree."""
    found: dict[str, str] = {}
    if raw.get(text) is not None:
        if not isinstance(raw[text], str):
            raise UserError(f"{text} must be a string, got {raw[text]!r}")
        found[text] = raw[text]
    if raw.get(names) is not None:
        layers = _as_list(raw[names])
        for name in layers:
            if not isinstance(name, str) or name not in LAYER_NAMES:
                raise UserError(f"{names} holds {name!r}; known: {', '.join(LAYER_NAMES)}")
        found[names] = "".join(LAYER_NAMES[name] for name in layers)
    for name, pattern in found.items():
        if len(pattern) > _MOST_LAYERS:
            raise UserError(
                f"{name} has {len(pattern)} layers, at most {_MOST_LAYERS} are supported"
            )
    if len(set(found.values())) > 1:
        raise UserError(
            f"{text} ({found[text]}) and {names} ({found[names]}) contradict each other"
        )
    return next(iter(found.values()), None)


def eos_token_ids(value: Any) -> list[int]:
    """An end-of-sequence id, or a list of them, as a list. Raises UserError for what is neither."""
    ids = _as_list(value)
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise UserError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


def _as_list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
