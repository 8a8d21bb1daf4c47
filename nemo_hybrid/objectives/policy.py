"""From rewards and log-probabilities to a signed weight per token: mathematics only, no model.

The gradient of every objective here is that of ``sum_t weight_t * CE_t / count``, where CE_t is the
cross-entropy -log pi(y_t) of the sampled token, so that the loss of pre-training is all that a
policy gradient needs. A weight may depend on the current probabilities: it is computed from them
before each update and is a constant of it.

Three policies meet: pi, which is trained; prox, the same before the first update on a rollout, as
the training forward computes it; and behav, that which sampled, as the generator computed it.

    weight_t = advantage * importance_t * ratio_t * active_t  +  kl * (exp(d_t) - 1)

Sources: PPO (arXiv 1707.06347), leave-one-out baseline (2402.14740), IcePop (2510.18855), GSPO
(2507.18071), CISPO (2506.13585), importance weights and filter as NVIDIA's recipes have them
(NeMo-RL, ClippedPGLossFn); the divergence is Schulman's estimator k3.

Shapes: P prompts, N samples of each; T tokens, of Q sequences; sequence_T numbers them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_hybrid.config.rl import PolicyOptions

_EPSILON = 1e-6  # beside a standard deviation
_ROUNDING = 1e-9  # below, relatively, a standard deviation is 0


class Tokens(NamedTuple):
    """What is known of sampled tokens: log-probabilities fp32 or fp64 [T] each."""

    pi_T: Tensor
    prox_T: Tensor
    behav_T: Tensor
    learnt_T: Tensor
    """bool: those that count."""
    sequence_T: Tensor
    """int64: number of the sequence, below ``sequences``."""
    sequences: int
    reference_T: Tensor | None = None
    """Log-probabilities by the model that ``kl`` is measured from."""

    def means(self, values_T: Tensor) -> Tensor:
        """Of each sequence, over its learnt tokens [Q]; 0 where there are none."""
        sums_Q = values_T.new_zeros(self.sequences)
        counts_Q = sums_Q.index_add(0, self.sequence_T, self.learnt_T.to(values_T))
        sums_Q.index_add_(0, self.sequence_T, values_T.masked_fill(~self.learnt_T, 0))
        return sums_Q / counts_Q.clamp(min=1)


def advantages(rewards_PN: Tensor, std: str) -> Tensor:
    """How much better each sample is than the others of its prompt: fp64 [P, N].

    The baseline is the mean of the other rewards (RLOO); ``std``: see `PolicyOptions`. Samples
    whose reward is NaN have none: they count nowhere and get 0, as does who is alone.
    """
    rewards_PN = rewards_PN.double()
    there_PN = ~rewards_PN.isnan()
    r_PN = rewards_PN.masked_fill(~there_PN, 0)
    n_P1 = there_PN.sum(1, keepdim=True)
    baseline_PN = (r_PN.sum(1, keepdim=True) - r_PN) / (n_P1 - 1).clamp(min=1)
    size_P1 = r_PN.abs().amax(1, keepdim=True)
    mean_P1 = r_PN.sum(1, keepdim=True) / n_P1.clamp(min=1)
    group_P1 = _std((r_PN - mean_P1).square().mul(there_PN).sum(1, keepdim=True), n_P1, size_P1)
    apart_PN = (r_PN - baseline_PN).masked_fill(~there_PN | (n_P1 < 2) | (group_P1 == 0), 0)
    if std == "none":
        return apart_PN
    sigma_PN = group_P1
    if std == "others":
        others_PNN = there_PN[:, None] & ~torch.eye(r_PN.shape[1], dtype=torch.bool).to(there_PN)
        squares_PNN = (r_PN[:, None] - baseline_PN[:, :, None]).square()
        others_PN = _std(squares_PNN.mul(others_PNN).sum(2), n_P1 - 1, size_P1)
        sigma_PN = torch.where(others_PN > 0, others_PN, group_P1)
    return torch.where(sigma_PN > 0, apart_PN / (sigma_PN + _EPSILON), apart_PN)


def _std(squares: Tensor, count: Tensor, size: Tensor) -> Tensor:
    """From the sum of squared distances of so many numbers of that size from their mean."""
    sigma = (squares / (count - 1).clamp(min=1)).sqrt()
    return sigma.masked_fill((sigma <= _ROUNDING * size) | (count < 2), 0)


def distillation(teacher_T: Tensor, prox_T: Tensor) -> Tensor:
    """Advantage per token that makes the policy gradient that of the reverse KL divergence from a
    teacher, sampled: its log-probability minus the student's (MOPD, arXiv 2601.02780)."""
    return teacher_T - prox_T


def importance(tokens: Tokens, options: PolicyOptions) -> Tensor:
    """exp(prox - behav) of each token [T], bounded; 0 where that is no number."""
    if options.importance == "none":
        return torch.ones_like(tokens.prox_T)
    low, high = options.importance_low, options.importance_high
    c_T = (tokens.prox_T - tokens.behav_T).exp()
    known_T = c_T.isfinite()
    if options.importance == "icepop":
        known_T = known_T & (c_T >= low) & (c_T <= high)
    return torch.where(known_T, c_T.clamp(low, high), 0)


def apart(tokens: Tokens) -> Tensor:
    """exp|behav - prox| of each token [T]: 1 where sampling and training agree."""
    return (tokens.behav_T - tokens.prox_T).abs().exp()


def kept(tokens: Tokens, options: PolicyOptions) -> Tensor:
    """bool [Q]: sequences whose mean of `apart` is no larger than the filter's bound."""
    error_Q = tokens.means(apart(tokens))
    if not options.sequence_filter:
        return torch.ones_like(error_Q, dtype=torch.bool)
    return error_Q <= options.sequence_filter  # not so for NaN


def weights(tokens: Tokens, advantage_T: Tensor, options: PolicyOptions) -> Tensor:
    """Of each token [T], in the dtype of the log-probabilities; 0 where it is not learnt."""
    if options.advantage_clip:
        advantage_T = advantage_T.clamp(-options.advantage_clip, options.advantage_clip)
    advantage_T = advantage_T.to(tokens.pi_T)
    log_ratio_T, importance_T = tokens.pi_T - tokens.prox_T, importance(tokens, options)
    if options.ratio == "sequence":
        log_ratio_T = tokens.means(log_ratio_T)[tokens.sequence_T]
        if options.clip != "cispo":  # where every token has a part in the ratio of all
            importance_T = tokens.means(importance_T)[tokens.sequence_T]
    ratio_T = log_ratio_T.exp()
    low, high = 1 - options.clip_low, 1 + options.clip_high
    if options.clip == "cispo":
        ratio_T = ratio_T.clamp(low, high)
    elif options.clip == "ppo":  # max(-A r, -A clamp(r)) has no gradient where it is the second
        beyond_T = torch.where(advantage_T > 0, ratio_T > high, ratio_T < low)
        ratio_T = ratio_T.masked_fill(beyond_T, 0)
    weight_T = advantage_T * importance_T * ratio_T
    if tokens.reference_T is not None:
        # d/dpi of exp(d) - 1 - d with d = reference - pi, and CE = -pi
        weight_T = weight_T + options.kl * torch.expm1(tokens.reference_T - tokens.pi_T)
    return weight_T.masked_fill(~tokens.learnt_T, 0)
