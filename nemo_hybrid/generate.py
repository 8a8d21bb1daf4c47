"""`generate`: continue a text with a trained model, or answer it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_hybrid.command_options import GenerateOptions
from nemo_hybrid.data.chat import load_template, need_template
from nemo_hybrid.data.sources import BadRecord
from nemo_hybrid.data.tokenizer import TextStream, TextTokenizer, load_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.sampling import generate


def stop_ids(directory: Path, default: int) -> list[int]:
    """Ids that end a text: of generation_config.json, else of config.json, else ``default``.

    Raises UserError for ids that are none.
    """
    from nemo_hybrid.checkpoint.companions import read_companions

    companions = read_companions(directory)
    return companions.stop_ids or companions.eos_token_ids or [default]


def _chat_prompt(tokenizer: TextTokenizer, directory: Path, prompt: str) -> NDArray[np.int64]:
    """Token ids that ask for an answer to a user's message."""
    template = need_template(load_template(tokenizer, directory), directory)
    messages = [{"role": "user", "content": prompt}]
    try:
        template.check(messages)
        text = template.render(messages, add_generation_prompt=True)
    except BadRecord as e:
        raise UserError(f"the prompt cannot be rendered: {e}") from e
    return tokenizer.encode_chat(text)[0]


def generate_command(options: GenerateOptions) -> None:
    """``nemo-hybrid generate``: print the prompt and its continuation as it appears, or the answer
    to it alone."""
    from nemo_hybrid.checkpoint.adapter import base_directory, is_adapter, locate
    from nemo_hybrid.checkpoint.load import load_model

    directory = given = locate(options.from_)
    if is_adapter(given) and not (given / "tokenizer.json").is_file():
        directory = base_directory(given)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json, so the prompt cannot be read")
    tokenizer = load_tokenizer(directory)
    model = load_model(given).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    if options.chat:
        ids = _chat_prompt(tokenizer, directory, options.prompt)
    else:
        ids = tokenizer.encode([options.prompt])[0]
    if not len(ids):
        raise UserError("--prompt is empty: give at least one token to continue")
    prompt_BS = torch.from_numpy(ids)[None].to(model.lm_head.weight.device)

    ends = stop_ids(directory, model.config.eos_token_id)
    began, count = time.monotonic(), 0
    text = TextStream(tokenizer)
    if not options.chat:
        sys.stdout.write(options.prompt)
    for ids_B in generate(
        model,
        prompt_BS,
        options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    ):
        token = int(ids_B)
        if token in ends:
            break
        count += 1
        sys.stdout.write(text.add(token))
        sys.stdout.flush()
    sys.stdout.write(text.finish() + "\n")
    seconds = time.monotonic() - began
    print(f"[{count} tokens in {seconds:.1f} s]", file=sys.stderr)
