"""What a process of the tests of expert parallelism does: ``python lockstep.py OUT``.

Two processes hold half of the experts each and generate with them: the same prompts divided between
them in three ways, of which one leaves process 1 without any, plainly and with drafts; and before
that once where process 1 fails and process 0 does not.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from helpers.generated import requests_of
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation import batched
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.generation.thinking import Markers
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import prepare_deepspeed
from nemo_hybrid.parallel.world import World

SEED, PROMPTS, DRAFTS = 3, 6, (0, 2)
CONFIG = tiny_config("ME*E", mtp_num_depths=1, mtp_pattern="*E")
DIVISIONS = {"odd and even": lambda n: n % 2, "unequal": lambda n: n == 5, "one alone": lambda n: 0}
# Some longer than there are tokens in the vocabulary.
LENGTHS = [1, 6, 66, 100, 11, 26]
Texts = dict[str, tuple[list[int], list[bool]]]


def requests() -> list[Request]:
    """Half of them think, three in four within a budget."""
    return [
        replace(request, budget=[None, 0, 2, 7][number % 4], thinks=number % 3 > 0)
        for number, request in enumerate(
            requests_of(PROMPTS, LENGTHS, [3, 12, 25], frozenset(), samples=(0, 1))
        )
    ]


def texts(model: HybridLM, some: list[Request], **options: object) -> Texts:
    """Tokens, and which of them are the model's choice."""
    markers = Markers((50,), (51, 52))
    generator = Generator(model, 3, temperature=1.0, seed=SEED, markers=markers, **options)
    found = generator.run(some)
    return {f"{r.request.prompt} {r.sample}": (r.ids, r.chosen) for r in found}


def failure(world: World, model: HybridLM, **options: object) -> str:
    """What a process says of which alone the head is broken, and what the other one says."""
    head_VD = model.lm_head.weight
    kept_D = head_VD[5].clone()
    try:
        head_VD[5] = float("nan") if world.rank else kept_D
        with world.agreed():
            texts(model, requests()[world.rank :: 2], **options)
    except UserError as error:
        return str(error)
    finally:
        head_VD[5] = kept_D
    return "none"


def divided(world: World) -> tuple[HybridLM, AllToAllDispatcher]:
    """The model of `loud_model`, of whose experts this process has its part."""
    dispatcher = AllToAllDispatcher(CONFIG.n_routed_experts, world.size, world.rank)
    dispatcher.join()
    model, whole = HybridLM(CONFIG, dispatcher=dispatcher), tensors_by_name(loud_model(CONFIG))
    own = slice(dispatcher.owned.start, dispatcher.owned.stop)
    with torch.no_grad():
        for name, tensor in tensors_by_name(model).items():
            tensor.copy_(whole[name][own] if ".experts." in name else whole[name])
    return model, dispatcher


@torch.no_grad()
def main(out: Path) -> None:
    world = World.start()
    prepare_deepspeed(world)
    model, dispatcher = divided(world)
    batched._PIECE = 1  # prompts are read chunk by chunk, so that some need more passes
    failures = [failure(world, model, drafts=n, most=dispatcher.most) for n in DRAFTS]
    found: dict[str, object] = {"failures": failures}
    for name, owner in DIVISIONS.items():
        some = [request for request in requests() if owner(request.prompt) == world.rank]
        for drafts in DRAFTS:
            found[f"{name} {drafts}"] = texts(model, some, drafts=drafts, most=dispatcher.most)
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    World.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
