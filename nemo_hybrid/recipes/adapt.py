"""Training of low-rank adapters alone: weights stay, and checkpoints are PEFT directories."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.adapter import (
    BASE,
    base_named,
    read_adapter,
    write_adapter,
)
from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.directory import Writer
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.manifest import to_json
from nemo_hybrid.checkpoint.writing import describe_model
from nemo_hybrid.config.finetune import FinetuneConfig, LoraOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.data.packing import PackedSamples
from nemo_hybrid.errors import UserError
from nemo_hybrid.model import lora
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.recipes.base import R, StoreRecipe
from nemo_hybrid.recipes.finetune import Finetune, freeze
from nemo_hybrid.recipes.reinforce import Reinforce
from nemo_hybrid.recipes.rollouts import Prompts
from nemo_hybrid.terminal import table_text
from nemo_hybrid.train.run import Run, Trained

Adaptable = TypeVar("Adaptable", FinetuneConfig, RlConfig)


class Adapting(StoreRecipe[Adaptable, R]):
    """Adapters beside frozen weights, which are those of model.from_hf in every step."""

    needs_origin = True
    origin_is = "the adapter is for"

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        self._load(model, world)  # also if resumed: checkpoints do not hold these weights
        config = self.config
        with world.agreed():
            self.adapted = lora.add_adapters(model, config.lora, config.train.seed)
            freeze(model, config.train)
        dtype = policy.weight_dtype(config.precision)
        return Trained(AdaptersAlone(model, config.lora, dtype, str(self._base), self.origin))

    def _table(self) -> str:
        return table_text(lora.HEADER, lora.table(self.adapted), right=lora.HEADER[1::2]).rstrip()

    def _find_origin(self, checkpoint: Path | None) -> Path:
        """Of a checkpoint to go on from the weights that it names."""
        named = None if checkpoint is None else base_named(checkpoint)
        return named if named and named.is_dir() else super()._find_origin(checkpoint)


class Adapt(Finetune, Adapting[FinetuneConfig, PackedSamples]):
    """Fine-tuning of them."""

    loaded_by = "peft"
    trained_words = "A LoRA adapter for"

    def describe(self, run: Run) -> list[str]:
        return [*super().describe(run), self._table()]

    def _warnings(self, run: Run) -> Iterator[str]:
        yield from super()._warnings(run)
        if any(one.name.endswith(".out_proj") for one in self.adapted):
            yield "warning: PEFT refuses adapters of out_proj: merge this one to use it there"


class ReinforceAdapters(Reinforce, Adapting[RlConfig, Prompts]):
    """Reinforcement learning of them."""

    loaded_by = "peft"
    trained_words = "A LoRA adapter for"

    def describe(self, run: Run) -> list[str]:
        return [*super().describe(run), self._table()]


class AdaptersAlone:
    """Checkpoints that hold a model's adapters and name the weights that these are for."""

    def __init__(
        self,
        model: HybridLM,
        options: LoraOptions,
        dtype: torch.dtype,
        digest: str,
        origin: Path | None,
    ) -> None:
        """``dtype`` and ``digest``: of the weights in ``origin``."""
        self._model, self._options, self._dtype = model, options, dtype
        self._digest, self._origin = digest, origin

    def tensors(self) -> dict[str, Tensor]:
        beginnings = tuple(f"{name}." for name, _ in lora.adapters(self._model))
        tensors = tensors_by_name(self._model)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings)}

    def read(self, directory: Path) -> None:
        """Raises UserError unless the directory holds an adapter for each of the tensors."""
        stored_options, _, tensors, _ = read_adapter(directory)
        targets, scale = self.tensors(), self._options.scale
        if stored_options.scale != scale:
            raise UserError(
                f"{directory} holds adapters that count {stored_options.scale:g} times (lora.alpha "
                f"/ lora.rank), this run's count {scale:g} times"
            )
        if tensors.keys() != targets.keys():
            name = min(tensors.keys() ^ targets.keys())
            raise UserError(
                f"{directory} and this run have different adapters: {name} is in one alone"
            )
        owned = self._model.owned_experts
        for name, target in targets.items():
            stored = tensors[name]
            part = stored if stored.dim() == 2 else stored[owned.start : owned.stop]
            if part.shape != target.shape or part.dtype != target.dtype:
                raise UserError(
                    f"{directory} has {name} as {part.dtype} {list(part.shape)}, this run as "
                    f"{target.dtype} {list(target.shape)}"
                )
            target.detach().copy_(part)

    def written(self, world: World, own: Iterable[tuple[str, Tensor, int]]) -> dict[str, Any]:
        """PEFT wants adapters in one file: rank 0 gets the experts' of all."""
        mine = [(name, first, tensor.detach().cpu()) for name, tensor, first in own]
        parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for name, first, tensor in chain(mine, *world.gather([] if world.rank == 0 else mine)):
            parts[name].append((first, tensor))
        full = {
            name: torch.cat([t for _, t in sorted(found, key=itemgetter(0))])
            for name, found in parts.items()
        }

        def write(writer: Writer, shape: HybridConfig, companions: Companions) -> Collection[str]:
            describe_model(writer, shape, self._dtype, companions)
            writer.write_text(BASE, to_json({"digest": self._digest}))
            return write_adapter(writer, self._options, str(self._origin), full)

        return {"weights": (), "adapter": write}
