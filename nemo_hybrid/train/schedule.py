"""Learning rate of every step, as a pure function of the step and the options.

Step 0 is the first optimizer step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from nemo_hybrid.config import TrainOptions


def learning_rate(step: int, train: TrainOptions) -> float:
    """Learning rate that optimizer step ``step`` (0 = the first) uses.

    Warm-up is linear, (step + 1) / (warmup_steps + 1) of the peak, so that the first step already
    moves and step ``warmup_steps`` has the peak. Afterwards, with min = min_lr_ratio * lr:

    - ``wsd``: the peak, then min + (lr - min) * (1 - sqrt(f)) over the last ``decay_steps`` steps,
      f = 1 / decay_steps at the first of them and 1 at the run's last step. This is the
      minus-sqrt decay that the Nemotron 3 models were trained with (Megatron-LM's
      optimizer_param_scheduler.py).
    - ``cosine``: min + (lr - min) * (1 + cos(pi f)) / 2, f = 0 at the end of the warm-up and 1 at
      the last step.
    - ``constant``: the peak.

    A run too short for its warm-up and decay decays over the steps that the warm-up leaves.
    Steps beyond the last one have the last one's rate.
    """
    last = train.max_steps - 1
    step = min(step, last)
    if step < train.warmup_steps:
        return train.lr * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "wsd":
        decay_steps = min(train.decay_steps, train.max_steps - train.warmup_steps)
        into_decay = step + 1 - (train.max_steps - decay_steps)
        if into_decay <= 0:
            return train.lr
        coefficient = 1 - math.sqrt(into_decay / decay_steps)
    else:
        span = last - train.warmup_steps
        fraction = (step - train.warmup_steps) / span if span else 1.0
        coefficient = (1 + math.cos(math.pi * fraction)) / 2
    min_lr = train.min_lr_ratio * train.lr
    return min_lr + (train.lr - min_lr) * coefficient
