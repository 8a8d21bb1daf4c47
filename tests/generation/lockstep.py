"""What a process of the tests of expert parallelism does: ``python lockstep.py OUT``.

Two processes hold half of the experts each and generate with them: the same prompts divided between
them in three ways, of which one leaves process 1 without any, plainly and with drafts.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import prepare_deepspeed
from nemo_hybrid.parallel.world import World

SEED, PROMPTS, DRAFTS = 3, 6, (0, 2)
CONFIG = tiny_config("ME*E", mtp_num_depths=1, mtp_pattern="*E")
DIVISIONS = {"odd and even": lambda n: n % 2, "unequal": lambda n: n == 5, "one alone": lambda n: 0}


def requests() -> list[Request]:
    draw = random.Random(0)
    return [
        Request(
            number, [draw.randrange(1, 61) for _ in range(1 + 5 * number)], 3 + 4 * number, (0, 1)
        )
        for number in range(PROMPTS)
    ]


def texts(model: HybridLM, some: list[Request], **options: object) -> dict[str, list[int]]:
    generator = Generator(model, 3, temperature=1.0, seed=SEED, **options)
    return {f"{r.request.prompt} {r.sample}": r.ids for r in generator.run(some)}


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


def main(out: Path) -> None:
    world = World.start()
    prepare_deepspeed(world)
    model, dispatcher = divided(world)
    found = {}
    for name, owner in DIVISIONS.items():
        some = [request for request in requests() if owner(request.prompt) == world.rank]
        for drafts in DRAFTS:
            found[f"{name} {drafts}"] = texts(model, some, drafts=drafts, most=dispatcher.most)
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    World.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
