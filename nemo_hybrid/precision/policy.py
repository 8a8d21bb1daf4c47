"""Which product of a model runs in which format: presets, the user's globs, the late switch, and
the table of it that a run shows at its start.

A product is a module that can take low precision: a linear layer, or the routed experts of a layer.
Rules are globs over module names; of those that match a product the last one counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import nn

from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import PrecisionOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.globs import last_rule, matched, of_all_layers, unmatched
from nemo_hybrid.precision import groups
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.precision.layers import QuantizedExperts, QuantizedLinear
from nemo_hybrid.precision.operands import BLOCKS, DTYPES, Format, Ingredients, PassFormats, Streams
from nemo_kernels import lowp


class Product(NamedTuple):
    """A module whose matrix products can take low precision."""

    name: str
    module: Any
    formats: PassFormats


Rules = tuple[tuple[str, str], ...]


class Preset(NamedTuple):
    """Rules, and the share of the backbone's layers, from its end, that they leave out."""

    rules: Rules = ()
    last_layers: float = 0.0


_NEMOTRON_3: Rules = (
    ("backbone.layers.*.mixer.in_proj", "nvfp4"),
    # In NVFP4 up to 40 % of its values became zero on Nano.
    ("backbone.layers.*.mixer.out_proj", "mxfp8"),
    ("backbone.layers.*.mixer.experts", "nvfp4"),
    ("backbone.layers.*.mixer.shared_experts.*", "nvfp4"),
    ("backbone.layers.*.mixer.up_proj", "nvfp4"),
    ("backbone.layers.*.mixer.down_proj", "nvfp4"),
)
"""Nemotron 3 Super and Ultra, pre-training: attention, latent projections and MTP stay bf16. Dense
MLP layers, which they do not have, are treated as shared experts are."""

PRESETS = {
    "bf16": Preset(),
    "fp32": Preset(),
    "nvfp4_super": Preset(_NEMOTRON_3, 14 / 88),
    "nvfp4_ultra": Preset(_NEMOTRON_3, 16 / 108),
    "nvfp4_all": Preset((("*", "nvfp4"),)),
}


class Precision:
    """The formats of a model's products in the course of a run, as the options choose them; the
    model has its dtype.

    ``probe`` is shown what is quantized. Raises UserError as :func:`resolve` does.
    """

    def __init__(
        self,
        model: nn.Module,
        options: PrecisionOptions,
        shape: ModelConfig,
        *,
        seed: int,
        rank: int,
        device_type: str,
        probe: Probe | None = None,
    ) -> None:
        self._options, self._streams, self._batch = options, Streams(seed, rank), 0
        self.table: list[tuple[str, ...]] = []
        """Rows below HEADER; none where all products run in the run's own format."""
        changed = _changed(model, options, shape)
        if changed:
            self.table = table_of(model, resolve(model, options, shape), shape, device_type)
        ingredients = Ingredients(**{n: getattr(options, n) for n in Ingredients._fields})
        self._products = []
        for product in changed:
            low = QuantizedLinear if is_linear(product.module) else QuantizedExperts
            quantized = low(product.name, product.formats, ingredients, self._streams, probe)
            self._products.append((product, quantized))
        self.start_step(0, 0)

    def start_step(self, step: int, batch: int) -> None:
        """Before the work on a global batch: ``step`` optimizer steps are done, ``batch`` batches
        read. Formats depend on ``step`` alone, so they are right behind a resume or a return."""
        self._batch = batch
        at = self._options.switch_step
        switched = at is not None and step >= at
        for product, quantized in self._products:
            formats = _switched(product.formats, self._options) if switched else product.formats
            quantized.formats = formats
            product.module.low_precision = None if formats == _all("bf16") else quantized

    def start_micro_batch(self, number: int) -> None:
        """Before the forward pass of a micro-batch; they count within the global batch."""
        self._streams.start(self._batch, number)


HEADER = ("products", "modules", "format", "share of multiply-adds", "runs")
EMULATED = "emulated: the values that units for these formats would compute, without their speed"


def weight_dtype(options: PrecisionOptions) -> torch.dtype:
    """Of the weights and activations of a run: low precision works on bf16 ones."""
    return DTYPES["fp32" if options.recipe == "fp32" else "bf16"]


def check(model: nn.Module, options: PrecisionOptions, shape: ModelConfig, tokens: int) -> None:
    """Raise UserError for what cannot be done, naming the option and the layer.

    ``model`` may be on the meta device; ``tokens`` are those of a micro-batch.
    """
    products = _changed(model, options, shape)
    if not products:
        raise UserError(
            "precision leaves every product of this model in bf16: choose recipe bf16 without "
            "formats, or another recipe, precision.formats or precision.last_layers_bf16"
        )
    for product in products:
        _check_dimensions(product, shape, tokens)
    passes = {
        "rht": ("wgrad",),
        "stochastic_rounding": ("dgrad", "wgrad"),
        "two_dimensional_weights": ("forward", "dgrad"),
    }
    for option, names in passes.items():
        used = any(getattr(p.formats, name) == "nvfp4" for p in products for name in names)
        if not getattr(options, option) and not used:
            raise UserError(
                f"precision.{option} has no effect: no {' or '.join(names)} product is in nvfp4"
            )
    if options.switch_step and all(_switched(p.formats, options) == p.formats for p in products):
        raise UserError(
            "precision.switch_step has no effect: no product of the passes that "
            f"precision.switch_passes ({options.switch_passes}) names is in nvfp4 or mxfp8"
        )


def resolve(model: nn.Module, options: PrecisionOptions, shape: ModelConfig) -> list[Product]:
    """All products of a model with their formats, in the model's order. Raises UserError."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if hasattr(module, "low_precision")]
    depth, last = len(shape.pattern), options.last_layers_bf16
    for glob in options.formats:
        if not matched(glob, names):
            raise UserError(f"precision.formats: {unmatched(glob, names, modules)}")
    base, preset = _base(options), PRESETS[options.recipe]
    if last is None:
        last = max(1, int(preset.last_layers * depth + 0.5)) if preset.last_layers else 0
    if last > depth:
        raise UserError(
            f"precision.last_layers_bf16 ({last}) exceeds the number of layers, {depth}"
        )
    rules = (
        *preset.rules,
        *((f"backbone.layers.{i}.*", base) for i in range(depth - last, depth)),
        *options.formats.items(),
    )
    parsed = [(glob, _parse(glob, text)) for glob, text in rules]
    return [Product(n, modules[n], last_rule(parsed, n) or _all(base)) for n in names]


def _changed(model: nn.Module, options: PrecisionOptions, shape: ModelConfig) -> list[Product]:
    """Those that run in another format than the run's own."""
    base = _all(_base(options))
    return [p for p in resolve(model, options, shape) if p.formats != base]


def _base(options: PrecisionOptions) -> Format:
    return "fp32" if options.recipe == "fp32" else "bf16"


def _all(format: Format) -> PassFormats:
    return PassFormats(format, format, format)


def _parse(glob: str, text: str) -> PassFormats:
    """``FORMAT`` or ``FORWARD/DGRAD/WGRAD``."""
    parts = str(text).split("/")
    for part in parts:
        if part not in get_args(Format):
            raise UserError(
                f"precision.formats: {glob}: unknown format {part!r}; known: "
                f"{', '.join(get_args(Format))}"
            )
    if len(parts) not in (1, 3):
        raise UserError(
            f"precision.formats: {glob}: expected FORMAT or FORWARD/DGRAD/WGRAD, got {text!r}"
        )
    return PassFormats(*cast(list[Format], parts * (3 // len(parts))))


def _switched(formats: PassFormats, options: PrecisionOptions) -> PassFormats:
    """What stays of the formats after the switch."""
    high = PassFormats(*(f if BLOCKS[f] == 1 else "bf16" for f in formats))
    return high if options.switch_passes == "all" else formats._replace(forward=high.forward)


def _check_dimensions(product: Product, shape: ModelConfig, tokens: int) -> None:
    """Raise UserError where a dimension is not made of whole blocks."""
    name, module, formats = product
    # Kernels take whole blocks of NVFP4 in both dimensions, whichever a pass sums over.
    least = BLOCKS["nvfp4"] if "nvfp4" in formats else 1
    inner, outer = max(least, BLOCKS[formats.forward]), max(least, BLOCKS[formats.dgrad])
    if is_linear(module):
        sizes = ((module.in_features, "inputs", inner), (module.out_features, "outputs", outer))
    else:  # the second product takes what the first one gives
        width, size = module.up_proj.shape[1:]
        both = max(inner, outer)
        sizes = ((size, "inputs", both), (width, "inner channels", both))
    change = groups.group_of(name).options
    if shape.moe_latent_size is None:
        change = change.replace("moe_latent_size", "hidden_size")
    for number, words, block in sizes:
        if number % block:
            raise UserError(
                f"{name} has {number} {words}, which is not divisible by {block}, the block of "
                f"{low_formats(formats)}: change model.{change}, or set "
                f"--precision.formats \"{{'{of_all_layers(name)}': bf16}}\""
            )
    if is_linear(module) and tokens % BLOCKS[formats.wgrad]:
        raise UserError(
            "train.micro_batch_size x data.sequence_length, in parts and pieces as parallel.cp, "
            f"data.short and train.tile make them ({tokens}), is not divisible by "
            f"{BLOCKS[formats.wgrad]}, the block of {formats.wgrad}, in which the weight gradient "
            f"of {name} sums over "
            "tokens: change one of them"
        )


def is_linear(module: nn.Module) -> bool:
    """The other products are experts."""
    return hasattr(module, "in_features")


def low_formats(formats: Iterable[str]) -> str:
    """Those of the formats that have blocks, in words."""
    return "/".join(dict.fromkeys(f for f in formats if BLOCKS[f] > 1))


def table_of(
    model: nn.Module, products: Sequence[Product], shape: ModelConfig, device_type: str
) -> list[tuple[str, ...]]:
    """Rows below `HEADER`. Counted are multiply-adds of all weight matrices per token;
    attention scores and the scan are no products with weights."""
    work: dict[tuple[str, str], list[int]] = {}
    for name, words, macs in work_of(model, products, shape):
        in_mtp, group = groups.in_mtp(name), groups.group_of(name).products
        group = "MTP block" if in_mtp and group != "router" else group
        work.setdefault((group, words), []).append(macs * (shape.mtp_num_depths if in_mtp else 1))
    total, order = sum(map(sum, work.values())), groups.PRODUCTS
    return [
        (group, str(len(macs)), words, f"{sum(macs) / total:.1%}", _runs(words, device_type))
        for (group, words), macs in sorted(work.items(), key=lambda item: order.index(item[0][0]))
    ]


def work_of(
    model: nn.Module, products: Sequence[Product], shape: ModelConfig
) -> Iterator[tuple[str, str, int]]:
    """Name, format and multiply-adds per token and pass of all modules with weight matrices."""
    for name, module in model.named_modules():
        if name == "lm_head":
            yield name, "bf16", module.weight.numel() * (1 + shape.mtp_num_depths)
        elif name.endswith(".gate"):
            yield name, "fp32", module.weight.numel()
    for name, module, formats in products:
        if is_linear(module):
            macs = module.in_features * module.out_features
        else:
            macs = 2 * shape.num_experts_per_tok * module.up_proj[0].numel()
        yield name, formats[0] if len(set(formats)) == 1 else "/".join(formats), macs


def _runs(words: str, device_type: str) -> str:
    """Natively or emulated; empty for what is in no low precision."""
    low = low_formats(words.split("/"))
    return low and ("native" if low == "nvfp4" and lowp.native(device_type) else "emulated")
