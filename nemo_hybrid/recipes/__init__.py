"""Kinds of run. Each says what it learns from, what it trains and what it minimises."""

from __future__ import annotations

from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import RunConfig, TrainingConfig
from nemo_hybrid.train.run import Recipe


def recipe_of(config: TrainingConfig) -> Recipe:
    """The kind of run that a configuration asks for."""
    if isinstance(config, RunConfig):
        from nemo_hybrid.recipes.pretrain import Pretrain

        return Pretrain(config)
    if isinstance(config, RlConfig):
        if config.lora.rank:
            from nemo_hybrid.recipes.adapt import ReinforceAdapters

            return ReinforceAdapters(config)
        from nemo_hybrid.recipes.reinforce import Reinforce

        return Reinforce(config)
    assert isinstance(config, FinetuneConfig)
    if config.lora.rank:
        from nemo_hybrid.recipes.adapt import Adapt

        return Adapt(config)
    if config.distill.preset != "none":
        from nemo_hybrid.recipes.distill import Distill

        return Distill(config)
    if config.boost.loss != "none":
        from nemo_hybrid.recipes.boost import Boost

        return Boost(config)
    from nemo_hybrid.recipes.finetune import Finetune

    return Finetune(config)
