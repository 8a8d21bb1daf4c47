"""`pretrain`, `finetune` and `rl`."""

from __future__ import annotations

import os

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import RunConfig, TrainingConfig
from nemo_hybrid.process import launched, uncollected
from nemo_hybrid.terminal import say_phase


def train_command(config: TrainingConfig) -> None:
    """Train, or go on with a run."""
    launcher = os.getppid()  # before the imports below, which take seconds: it may die meanwhile
    # Checked here already, because importing the training loop takes seconds.
    from nemo_hybrid.checkpoint.steps import model_shape

    config.validate(model_shape(config.model))
    config.validate_world(launched()[1])
    say_phase(f"{config.run_dir}: loading libraries")
    with uncollected():
        from nemo_hybrid.recipes import recipe_of
        from nemo_hybrid.train.loop import train

        recipe = recipe_of(config)
    train(recipe, launcher)


COMMANDS = {
    "pretrain": Command(train_command, kind=RunConfig),
    "finetune": Command(train_command, kind=FinetuneConfig),
    "rl": Command(train_command, kind=RlConfig),
}
