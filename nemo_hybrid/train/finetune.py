"""What fine-tuning has that pre-training has not: samples instead of text, parts that stay as they
are, and a model directory at the end."""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace
from pathlib import Path

from torch import nn

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.checkpoint.files import MANIFEST, resolve
from nemo_hybrid.checkpoint.publish import publish
from nemo_hybrid.config import HybridConfig
from nemo_hybrid.data.loader import Data
from nemo_hybrid.data.packing import PackedSamples
from nemo_hybrid.data.prepare import HELDOUT, TRAIN
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.data.store import SampleStore
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming
from nemo_hybrid.finetune_options import FinetuneConfig, FinetuneTrainOptions, SampleOptions
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import parameter_count
from nemo_hybrid.train.metrics import METRICS_FILE, evaluations, read_metrics
from nemo_hybrid.train.run_dir import MODEL, SAMPLES

_END_BYTES = 1 << 20
_LOOKED_AT = 20  # samples
_ENDING = 3  # learnt tokens: a line break may follow the one that ends a turn


def make_samples(config: FinetuneConfig, hybrid: HybridConfig) -> None:
    """Turn data.path into samples in the run's directory, where it is not made of samples already.

    For rank 0 alone. Raises UserError for records that cannot be learnt from.
    """
    data = config.data
    if is_prepared(data.path):
        _without_sample_options(config)
        return
    summary = prepare_samples(
        data,
        [str(data.path)],
        str(resolve(str(config.model.from_hf))),
        Path(config.run_dir) / SAMPLES,
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
    stores = [
        SampleStore.open(root / split, data.verify)
        for split in (TRAIN, HELDOUT)
        if (root / split).exists()
    ]
    for store in stores:
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
    heldout = stores[1] if len(stores) > 1 else None
    if config.train.eval_sequences and heldout is None:
        raise UserError(
            "there are no held-out samples: set data.heldout above 0, name data.heldout_path, or "
            "set train.eval_sequences to 0"
        )
    return PackedSamples(stores[0], heldout, data.sequence_length, hybrid.pad_token_id)


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


def ending_missed(config: FinetuneConfig, data: Data, eos_id: int) -> str | None:
    """What to say where samples end otherwise than generation does, which then would not stop."""
    assert isinstance(data, PackedSamples)
    known = read_companions(resolve(str(config.model.from_hf)))
    ends = known.stop_ids or known.eos_token_ids or [eos_id]
    for i in range(min(_LOOKED_AT, len(data.train.lengths))):
        ids, targets = data.train.sample(i)
        if set(ids[targets][-_ENDING:].tolist()) & set(ends):
            return None
    return (
        f"warning: none of the first samples ends with a token that ends generation ({ends}): text "
        "will go on behind an answer, unless eos_token_id in generation_config.json of "
        f"{config.model.from_hf} lists the token that ends a turn"
    )


def with_steps(config: FinetuneConfig, data: Data) -> FinetuneConfig:
    """The same run for as many steps as its epochs take. Raises UserError where that does not fit
    other options."""
    assert isinstance(data, PackedSamples)
    train = config.train
    steps = math.ceil(len(data.packs) * train.epochs / train.global_batch_size)
    config = replace(config, train=replace(train, max_steps=steps))
    config.validate_steps()
    return config


def base_digest(config: FinetuneConfig) -> str | None:
    """Identity of the weights that adapters are for: names, sizes and ends of the files (all of
    them would take too long for a large model), and the checksums that may stand beside them."""
    if not config.lora.rank:
        return None
    directory = resolve(str(config.model.from_hf))
    digest = hashlib.sha256()
    with naming("read", directory):
        for path in sorted([*directory.glob("*.safetensors"), *directory.glob(MANIFEST)]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


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


def parts(model: HybridLM) -> str:
    """What is trained, in words; experts of all ranks."""
    total, trained = parameter_count(model), parameter_count(model, trained=True)
    return f"trained {trained:,} of {total:,} parameters ({trained / total:.2%})"


def describe(config: FinetuneConfig, data: Data, model: HybridLM) -> str:
    """The samples and their packs, the loss, and what is trained, in words."""
    assert isinstance(data, PackedSamples)
    train, loss = config.train, str(config.train.loss)
    if train.second_stage_step is not None:
        loss = f"tokens, after step {train.second_stage_step} conversations"
    return (
        f"data {len(data.train.lengths):,} samples of {data.tokens:,} tokens in "
        f"{len(data.packs):,} packs of {config.data.sequence_length} ({data.efficiency:.1%} full); "
        f"{train.max_steps} steps of {train.global_batch_size} packs\n"
        f"loss averaged over {loss}, MTP weight {train.mtp_loss_weight:g}; {parts(model)}"
    )


def publish_model(config: FinetuneConfig, checkpoint: Path) -> None:
    """Make RUN_DIR/model of the last checkpoint: what transformers, PEFT and engines load. For rank
    0 alone. Raises UserError."""
    publish(checkpoint, Path(config.run_dir) / MODEL, _card(config))


def _card(config: FinetuneConfig) -> str:
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
        f"trained with nemo_hybrid {__version__} for {train.max_steps} steps of "
        f"{train.global_batch_size} packs of {config.data.sequence_length} tokens, learning rate "
        f"{train.lr:g}. The base model's licence and limits apply.",
    ]
    if found:
        before, after = found[0], found[-1]
        lines += [
            "",
            f"Held-out loss (nats per learnt token): {before[1][0]:.4f} after step {before[0]}, "
            f"{after[1][0]:.4f} after step {after[0]}.",
        ]
    return "\n".join(lines) + "\n"
