"""`compare-logprobs`: do two checkpoints give a text the same probabilities?

Only one model is in memory at a time.

Shapes: S tokens of one piece, T compared tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic.dataclasses import dataclass as options

from nemo_hybrid.commands.command import Command, check_paths, check_text
from nemo_hybrid.config.base import (
    CHECKED,
    NOT_NEGATIVE,
    CommandOptions,
    PositiveInt,
    Seed,
    refuse,
)
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nemo_hybrid.data.tokenizer import TextTokenizer
    from nemo_hybrid.export.divergence import PerToken, States


@options(config=CHECKED)
class CompareOptions(CommandOptions):
    """Compare two checkpoints' probabilities of a text, token by token."""

    paths: list[str] = field(default_factory=list)
    """A and B: run, checkpoint or Hugging Face directories. B may be left out when backend is not
    this program: then it is A again."""
    backend: Literal["nemo_hybrid", "transformers", "transformers_unclamped"] = "nemo_hybrid"
    """What computes B. transformers keeps Mamba-2 time steps above time_step_min, which neither
    this program nor Megatron-LM does, so that small differences are to be expected;
    transformers_unclamped takes that limit away, so that only rounding should remain."""
    data: str | None = None
    """UTF-8 text file to read with the checkpoints' tokenizer, or token store (its held-out part).
    Without data and prompt: the held-out data of the run that wrote A, if that is still there, else
    random token ids."""
    prompt: str | None = None
    """Text to compare on, instead of data."""
    tokens: PositiveInt = 2048
    """Most tokens whose probabilities are compared."""
    sequence_length: PositiveInt = 512
    """Tokens that the models see at once; the text is cut into pieces of this length."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and computation, whatever the files hold."""
    tolerance: Annotated[float | None, NOT_NEGATIVE] = None
    """End with status 3 when the mean absolute difference exceeds this (in nats). Single tokens may
    differ by more."""
    seed: Seed = 1234
    """Seed of the random token ids."""

    def validate(self) -> None:
        check_paths("compare-logprobs", self.paths, 1 if self.backend != "nemo_hybrid" else 2, 2)
        refuse(
            (
                self.data is not None and self.prompt is not None,
                "give --data or --prompt, not both",
            ),
            (self.prompt == "", "--prompt is empty; leave it out to compare on random token ids"),
        )
        check_text(self.prompt or "")


@dataclass(frozen=True)
class Text:
    """The tokens to compare on."""

    ids: Tensor
    """[T + 1]: every token but the first is predicted."""
    about: str
    """Where they come from, in words."""
    tokenizer: TextTokenizer | None

    def place(self, index: int) -> str:
        """Which of the T predicted tokens this is, in words."""
        token = int(self.ids[index + 1])
        shown = f" {self.tokenizer.decode([token])!r}" if self.tokenizer else ""
        return f"token {index + 1} (id {token}{shown})"


def compare_command(options: CompareOptions) -> int:
    """Print the differences; 3 where they exceed the tolerance.

    Raises UserError for checkpoints that do not read the same tokens.
    """
    from nemo_hybrid.checkpoint.adapter import locate
    from nemo_hybrid.checkpoint.steps import reading

    def compare(a: Path) -> int:
        return reading(options.paths[-1], lambda b: _compare(options, a, b), locate)

    return reading(options.paths[0], compare, locate)


def _compare(options: CompareOptions, a: Path, b: Path) -> int:
    from nemo_hybrid.export.divergence import per_token
    from nemo_hybrid.precision.policy import DTYPES

    text = _text(options, a, b)
    how = (text.ids, options.sequence_length, DTYPES[options.dtype])
    states_a = our_states(a, *how)
    if options.backend == "nemo_hybrid":
        states_b = our_states(b, *how)
    else:
        states_b = their_states(b, *how, unclamped=options.backend == "transformers_unclamped")
    found = per_token(states_a, states_b, text.ids[1:], show=True)
    _print(options, a, b, text, found)
    mean = float((found.b_T - found.a_T).abs().mean())
    limit = math.inf if options.tolerance is None else options.tolerance
    # Not a number compares as false.
    return 0 if math.isfinite(mean) and mean <= limit else 3


def our_states(directory: Path, ids: Tensor, length: int, dtype: torch.dtype) -> States:
    """Final hidden states by this program. ids [T + 1]; pieces of ``length`` tokens are one
    document each. Raises UserError as load_model does."""
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.export.divergence import states

    pieces = ids[None, :-1].split(length, 1)
    return states(load_model(directory, dtype), pieces, f"computing {directory}", True)


def their_states(
    directory: Path, ids: Tensor, length: int, dtype: torch.dtype, *, unclamped: bool = False
) -> States:
    """Final hidden states by transformers' NemotronH; like our_states.

    ``unclamped``: time steps may be as small as the checkpoint makes them. transformers' mixer
    limits them to (time_step_min, infinity) in the forward pass, where Megatron-LM means that field
    for initialization only. Raises UserError where the directory does not hold the model, or
    transformers finds no place for a tensor; it has none for those of the MTP block.
    """
    from transformers import NemotronHForCausalLM

    from nemo_hybrid.checkpoint.load import plan_model
    from nemo_hybrid.export.divergence import states_of

    plan_model(directory)[1].raise_errors()
    try:
        model, info = NemotronHForCausalLM.from_pretrained(
            directory, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"transformers cannot load {directory}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[kind] if not str(name).startswith("mtp."))
        if names:
            what = kind.replace("_", " ")
            raise UserError(
                f"transformers loads {directory} with {len(names)} {what}, such as {names[0]}"
            )
    if unclamped:
        limited = [module for module in model.modules() if hasattr(module, "time_step_limit")]
        if len(limited) != HybridConfig.from_hf(str(directory)).pattern.count("M"):
            raise UserError(
                "the limit on time steps was not found in this version of transformers; use "
                "--backend transformers"
            )
        for module in limited:
            module.time_step_limit = (0.0, math.inf)

    def hidden(ids_1S: Tensor) -> Tensor:
        return model.model(ids_1S, use_cache=False).last_hidden_state

    pieces = ids[None, :-1].split(length, 1)
    return states_of(model, hidden, pieces, f"computing {directory} by transformers", True)


def _text(options: CompareOptions, a: Path, b: Path) -> Text:
    """The tokens to compare on. Raises UserError where A and B do not read the same ones."""
    import torch

    from nemo_hybrid.data.store import TOKENIZER
    from nemo_hybrid.data.tokenizer import load_tokenizer

    vocab_size, other = (HybridConfig.from_hf(str(place)).vocab_size for place in (a, b))
    if vocab_size != other:
        raise UserError(
            f"vocab_size differs: {vocab_size} in {a}, {other} in {b}; only models with the same "
            "tokens can be compared"
        )
    if options.data is None and options.prompt is None:
        options = replace(options, data=heldout_of(a))
    readers = [place for place in (a, b) if (place / TOKENIZER).is_file()]
    tokenizers = [load_tokenizer(place) for place in readers]
    encoded = [_encode(*reader, options) for reader in zip(readers, tokenizers, strict=True)]
    if len(tokenizers) == 2 and (
        _vocabulary(tokenizers[0]) != _vocabulary(tokenizers[1]) or not torch.equal(*encoded)
    ):
        raise UserError(
            f"the tokenizers of {a} and {b} differ; only models with the same tokens can be "
            "compared"
        )
    tokenizer = tokenizers[0] if tokenizers else None
    if options.data is None and options.prompt is None:
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.randint(0, vocab_size, (options.tokens + 1,), generator=generator)
        return Text(ids, f"random token ids (seed {options.seed})", tokenizer)
    source = options.data or "the prompt"
    if not encoded:
        raise UserError(f"neither {a} nor {b} has a {TOKENIZER}, so {source} cannot be read")
    ids = encoded[0]
    if len(ids) < 2:
        raise UserError(f"{source} has fewer than two tokens: there is nothing to predict")
    if int(ids.max()) >= vocab_size:
        raise UserError(
            f"{source} holds token id {int(ids.max())}, beyond the model's vocab_size {vocab_size}"
        )
    return Text(ids, source, tokenizer)


def heldout_of(checkpoint: Path) -> str | None:
    """The token store with a held-out part that a checkpoint's run was trained on, if it is still
    there."""
    from nemo_hybrid.checkpoint.steps import remembered
    from nemo_hybrid.data.store import HELDOUT

    path = remembered(checkpoint).get("data.path")
    return path if isinstance(path, str) and (Path(path) / HELDOUT).is_dir() else None


def _encode(place: Path, tokenizer: TextTokenizer, options: CompareOptions) -> Tensor:
    """The beginning of the file, or of the prompt if there is one; of a store held-out sequences,
    one behind the other."""
    import torch

    from nemo_hybrid.export.calibrate import first_ids, read_pieces

    if options.data is not None:
        if Path(options.data).is_dir():
            length, shape = options.sequence_length, HybridConfig.from_hf(str(place))
            found = read_pieces(options.data, place, shape, options.tokens + 1, "heldout", length)
            return torch.cat(found, 1)[0, : options.tokens + 1]
        return first_ids(Path(options.data), tokenizer, options.tokens + 1)
    ids = tokenizer.encode([options.prompt or ""])[0]
    return torch.from_numpy(ids[: options.tokens + 1])


def _vocabulary(tokenizer: TextTokenizer) -> dict[str, int]:
    return tokenizer.tokenizer.get_vocab(with_added_tokens=True)


def _print(options: CompareOptions, a: Path, b: Path, text: Text, found: PerToken) -> None:
    print(f"A: {a}\nB: {b}, computed by {options.backend}")
    print(f"{len(found.a_T)} tokens of {text.about}, in pieces of {options.sequence_length}")
    difference_T = (found.b_T - found.a_T).abs()
    measured = {"|logprob B - logprob A|": difference_T, "KL(A||B)": found.kl_T}
    rows = [
        (name, f"{x_T.mean():.3e}", f"{x_T.max():.3e}", text.place(int(x_T.argmax())))
        for name, x_T in measured.items()
    ]
    print_table(("nats per token", "mean", "max", "where"), rows)
    print(f"loss: A {-found.a_T.mean():.4f}, B {-found.b_T.mean():.4f} nats per token")
    print(f"same most probable token: {found.same_top_T.double().mean():.2%}")
    if options.backend == "transformers":
        print(
            "transformers keeps Mamba-2 time steps above time_step_min, which may explain a "
            "difference: try --backend transformers_unclamped"
        )


COMMANDS = {"compare-logprobs": Command(compare_command, CompareOptions, reads="paths")}
