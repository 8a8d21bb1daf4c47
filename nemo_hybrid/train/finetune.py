"""What fine-tuning has that pre-training has not: samples instead of text, parts that stay as they
are, and a model directory at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.adapter import CONFIG as ADAPTER
from nemo_hybrid.checkpoint.companions import Companions, read_companions
from nemo_hybrid.checkpoint.files import step_of
from nemo_hybrid.checkpoint.publish import publish
from nemo_hybrid.config.finetune import FinetuneConfig, FinetuneTrainOptions, SampleOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.loader import Data
from nemo_hybrid.data.packing import PackedSamples, open_stores
from nemo_hybrid.data.prepare import RECORD, TRAIN
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import parameter_count
from nemo_hybrid.train.distill import student_formats
from nemo_hybrid.train.metrics import METRICS_FILE, evaluations, read_metrics
from nemo_hybrid.train.run_dir import MODEL, SAMPLES

if TYPE_CHECKING:
    from nemo_hybrid.train.build import Run

_LOOKED_AT = 20  # samples
_ENDING = 3  # learnt tokens: a line break may follow the one that ends a turn


def make_samples(config: FinetuneConfig, hybrid: HybridConfig, origin: Path) -> None:
    """Turn data.path into samples in the run's directory, where it is not made of samples already.

    For rank 0 alone. Raises UserError for records that cannot be learnt from.
    """
    data, out = config.data, Path(config.run_dir) / SAMPLES
    if is_prepared(data.path):
        _without_sample_options(config)
        return
    if out.exists() and not (out / RECORD).is_file():
        raise UserError(
            f"{out} holds something else than the samples of a run: choose another run_dir"
        )
    if out.exists() and not Path(str(data.path)).exists():
        print(f"{data.path} is not there any more: the samples in {out} are used", flush=True)
        return
    summary = prepare_samples(
        data,
        [str(data.path)],
        str(origin),
        out,
        heldout_paths=[data.heldout_path] if data.heldout_path else [],
        seed=config.train.seed,
        vocab_size=hybrid.vocab_size,
        reuse=True,
    )
    print(summary, flush=True)


def open_samples(config: FinetuneConfig, hybrid: HybridConfig) -> PackedSamples:
    """Open the samples and pack them. Raises UserError where they do not fit model or options."""
    data = config.data
    root = Path(str(data.path)) if is_prepared(data.path) else Path(config.run_dir) / SAMPLES
    train, heldout = open_stores(root, data.verify)
    for store in filter(None, (train, heldout)):
        if store.info.vocab_size > hybrid.vocab_size:
            raise UserError(
                f"{store.path} has token ids up to {store.info.vocab_size - 1}, the model's "
                f"vocabulary has {hybrid.vocab_size} entries: prepare the samples with the model's "
                "own tokenizer"
            )
        longest = int(store.lengths.max())
        if longest > data.sequence_length:
            raise UserError(
                f"{store.path} holds a sample of {longest} tokens: set data.sequence_length "
                f"({data.sequence_length}) to at least that"
            )
    if config.train.eval_sequences and heldout is None:
        raise UserError(
            "there are no held-out samples: set data.heldout above 0, name data.heldout_path, or "
            "set train.eval_sequences to 0"
        )
    return PackedSamples(train, heldout, data.sequence_length, hybrid.pad_token_id)


def is_prepared(path: str | None) -> bool:
    """Whether a path names samples that `prepare --for finetune` made."""
    return (Path(str(path)) / TRAIN / "store.json").is_file()


def _without_sample_options(config: FinetuneConfig) -> None:
    """Raise UserError for options that would have no effect on samples that are there already."""
    data, free = config.data, ("sequence_length",)
    given = [
        f.name
        for f in fields(SampleOptions)
        if f.name not in free and getattr(data, f.name) != f.default
    ]
    if data.heldout_path:
        given.append("heldout_path")
    if given:
        raise UserError(
            f"data.{given[0]} has no effect: {data.path} holds samples that are made already; give "
            "the option to `nemo-hybrid prepare --for finetune`"
        )


def warnings(run: Run) -> Iterator[str]:
    """What a user may not have meant."""
    config, data, train = run.config, run.data, run.config.train
    assert isinstance(data, PackedSamples)
    if train.warmup_steps >= train.max_steps:
        yield (
            f"warning: the run ends after {train.max_steps} steps, before train.warmup_steps "
            f"({train.warmup_steps}) have brought the learning rate to train.lr"
        )
    if any(one.name.endswith(".out_proj") for one in run.adapted):
        yield "warning: PEFT refuses adapters of out_proj: merge this one to use it there"
    known = read_companions(run.origin) if run.origin else Companions()
    ends = known.stop_ids or known.eos_token_ids or [run.model.config.eos_token_id]
    samples = map(data.train.sample, range(min(_LOOKED_AT, len(data.train.lengths))))
    if not any(set(ids[targets][-_ENDING:].tolist()) & set(ends) for ids, targets in samples):
        yield (
            f"warning: none of the first samples ends with a token that ends generation ({ends}): "
            "text will go on behind an answer, unless eos_token_id in generation_config.json of "
            f"{config.model.from_hf} lists the token that ends a turn"
        )


def with_steps(config: FinetuneConfig, data: Data) -> FinetuneConfig:
    """The same run for as many steps as its epochs take. Raises UserError where that does not fit
    other options."""
    assert isinstance(data, PackedSamples)
    train, packs = config.train, len(data.packs)
    if packs < train.global_batch_size:
        raise UserError(
            f"the samples fill {packs} packs, fewer than train.global_batch_size "
            f"({train.global_batch_size}): lower it, or set train.max_steps to repeat packs within "
            "a step"
        )
    steps = math.ceil(packs * train.epochs / train.global_batch_size)
    config = replace(config, train=replace(train, max_steps=steps))
    config.validate_steps()
    return config


def freeze(model: nn.Module, train: FinetuneTrainOptions) -> None:
    """Leave out of the training what the options do not name. Raises UserError for adapters among
    it."""
    for name, parameter in model.named_parameters():
        mtp = name.startswith("mtp.")
        trained = mtp or train.trained == "all"
        trained &= not mtp or train.mtp_loss_weight > 0
        trained &= train.train_router or ".gate." not in name
        if parameter.requires_grad and not trained and "lora." in name:
            raise UserError(f"{name} would not be trained: train.mtp_loss_weight is 0")
        parameter.requires_grad_(parameter.requires_grad and trained)


def describe(config: FinetuneConfig, data: Data, model: HybridLM) -> str:
    """Samples and their packs, the loss, and what is trained, experts of all ranks, in words."""
    assert isinstance(data, PackedSamples)
    total, trained = parameter_count(model), parameter_count(model, trained=True)
    train, loss = config.train, str(config.train.loss)
    if train.second_stage_step is not None:
        loss = f"tokens, after step {train.second_stage_step} conversations"
    distilled = f"\n{_distilled(config, model.config)}" if config.distill.preset != "none" else ""
    return (
        f"data {len(data.train.lengths):,} samples of {data.tokens:,} tokens in "
        f"{len(data.packs):,} packs of {config.data.sequence_length} ({data.efficiency:.1%} full); "
        f"{train.max_steps} steps of {train.global_batch_size} packs\n"
        f"loss averaged over {loss}, MTP weight {train.mtp_loss_weight:g}; trained {trained:,} of "
        f"{total:,} parameters ({trained / total:.2%}){distilled}"
    )


def _distilled(config: FinetuneConfig, shape: HybridConfig) -> str:
    """What is distilled, in words."""
    counts = Counter(student_formats(config, shape).values())
    formats = ", ".join(f"{count} weights in {f}" for f, count in counts.items() if f != "bf16")
    share = f"{config.distill.weight:g} of the loss" if config.distill.weight < 1 else "the loss"
    return (
        f"distilled from {config.model.from_hf} for {config.distill.preset} ({formats}): {share} "
        "is the KL divergence from it; held-out losses are cross-entropies"
    )


def publish_model(config: FinetuneConfig, checkpoint: Path) -> None:
    """Make RUN_DIR/model of the last checkpoint: what transformers, PEFT and engines load. For rank
    0 alone. Raises UserError."""
    # Beside an adapter transformers would take config.json for that of a whole model.
    left_out = ["config.json"] if (checkpoint / ADAPTER).is_file() else []
    card = _card(config, step_of(checkpoint))
    publish(checkpoint, Path(config.run_dir) / MODEL, card, left_out)


def _card(config: FinetuneConfig, steps: int) -> str:
    """README.md of the model, in the form that the Hugging Face hub reads."""
    train, base = config.train, Path(str(config.model.from_hf)).name
    rows = list(read_metrics(Path(config.run_dir) / METRICS_FILE))
    found = evaluations(rows)
    lines = [
        "---",
        f"library_name: {'peft' if config.lora.rank else 'transformers'}",
        "tags: [nemotron_h, fine-tuned]",
        "---",
        f"# {base}, fine-tuned",
        "",
        f"{'A LoRA adapter for' if config.lora.rank else 'Weights that began as'} `{base}`, "
        f"trained with nemo_hybrid {__version__} for {steps} steps of "
        f"{train.global_batch_size} packs of {config.data.sequence_length} tokens, learning rate "
        f"{train.lr:g}. The base model's licence and limits apply.",
    ]
    if config.distill.preset != "none":
        lines += [
            "",
            f"Quantization-aware distillation: it learnt the probabilities of `{base}` while it "
            f"computed in the formats of `nemo-hybrid export --preset {config.distill.preset}`"
            f"{' and further ones' if config.distill.formats else ''}. Use it exported in these.",
        ]
    if len(found) > 1:
        before, after = found[0], found[-1]
        lines += [
            "",
            f"Held-out loss (nats per learnt token): {before[1][0]:.4f} after step {before[0]}, "
            f"{after[1][0]:.4f} after step {after[0]}.",
        ]
    return "\n".join(lines) + "\n"
