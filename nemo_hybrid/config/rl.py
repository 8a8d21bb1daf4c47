"""Options of `rl`, beside and instead of those of `pretrain`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    NAMED,
    OPTIONS_BY_NAME,
    SHARES,
    BelowOne,
    NotNegativeFloat,
    NotNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    refuse,
)
from nemo_hybrid.config.finetune import LoraOptions
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import IN_STEPS, SequenceOptions, TrainingConfig, TrainOptions
from nemo_hybrid.errors import UserError


@dataclass(config=CHECKED)
class PolicyOptions(Options):
    """How rewards become a weight per token; the defaults are those of Nemotron 3 Ultra."""

    section: ClassVar[str] = "rl."

    std: Literal["others", "group", "none"] = "others"
    """What divides a reward's distance from the mean of the prompt's other rewards: the standard
    deviation of those others (where it is 0, of all), of all, or nothing."""
    advantage_clip: NotNegativeFloat = 20.0
    """Advantages lie between minus this and this; 0: anywhere."""
    importance: Literal["tis", "icepop", "none"] = "tis"
    """What becomes of the ratio of a token's probability in training to that at sampling: clamped
    to [importance_low, importance_high], 0 outside of it, or 1."""
    importance_low: NotNegativeFloat = 0.2
    """Least importance weight."""
    importance_high: PositiveFloat = 5.0
    """Largest importance weight."""
    sequence_filter: NotNegativeFloat = 2.0
    """Samples whose mean of exp|difference of log-probabilities| between sampling and training
    exceeds this leave the loss; 0: none does."""
    updates: PositiveInt = 1
    """Optimizer steps on the samples of one rollout. With one the policy ratio is 1, and clip has
    no effect."""
    clip: Literal["ppo", "cispo", "none"] = "ppo"
    """What is done with the policy ratio, new over old probability of a token: ppo: beyond its
    bounds, in the direction of its advantage, a token has no gradient; cispo: it is clamped to
    them and not differentiated."""
    clip_low: BelowOne = 0.2
    """The ratio's lower bound is 1 minus this."""
    clip_high: NotNegativeFloat = 0.28
    """The ratio's upper bound is 1 plus this."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: the geometric mean of a sample's ratios stands for each of its tokens (GSPO)."""
    kl: NotNegativeFloat = 0.0
    """Weight of the KL divergence from model.from_hf, estimated from the sampled tokens."""
    overlong: Literal["keep", "mask"] = "keep"
    """mask: samples that were cut off at rollout.response_tokens leave the loss."""
    average: Literal["tokens", "samples"] = "tokens"
    """What is averaged over the global batch: all tokens, or every sample's own mean."""
    max_mismatch: Annotated[float, Field(ge=1)] = 1.05
    """Mean of exp|difference of log-probabilities| between sampling and training that stops the
    run, if three steps in a row exceed it."""
    router_replay: bool = False
    """Have training send tokens to the experts that they went to when they were sampled, with
    weights that its own router gives them: in bf16 it would choose others for some."""
    verifiers: PositiveInt = 1
    """Processes per rank in which environments judge answers."""
    deadline_s: PositiveFloat = 10.0
    """Longest time that judging one answer may take."""


@dataclass(config=CHECKED)
class RolloutOptions(Options):
    """What is sampled in every step."""

    section: ClassVar[str] = "rollout."

    samples: PositiveInt = 16
    """Answers to each prompt; a step has train.global_batch_size of them."""
    response_tokens: PositiveInt = 256
    """Most tokens of an answer."""
    slots: PositiveInt = 64
    """Answers that each process generates at once; they do not depend on it."""
    temperature: float = 1.0
    """Has to be 1: other answers are not the policy's."""
    engine: str = "local"
    """What samples: local, this run, or the URL of a server that offers OpenAI's completions with
    token ids, and reads the weights of every step from RUN_DIR/engine."""
    engine_timeout_s: PositiveFloat = 600.0
    """Longest silence of the server."""
    lag: Annotated[int, Field(ge=0, le=1)] = 0
    """1: answers are sampled before the step that precedes theirs, with its weights; by a
    server while that step is computed."""
    log_every: NotNegativeInt = 0
    """Steps between those whose answers and scores are written to RUN_DIR/rollouts; 0: never."""


@dataclass(config=CHECKED)
class PromptOptions(SequenceOptions):
    """What is asked."""

    section: ClassVar[str] = "data."

    path: str | None = None
    """Prompts to learn from (.jsonl, .parquet, a saved dataset ...): rows of prompt (text, or
    messages to be answered), messages or input_ids, with environment and what that needs; or rows
    of NeMo Gym."""
    heldout_path: str | None = None
    """The same for evaluation."""
    sequence_length: PositiveInt = 2048
    """Tokens per training sequence, into which prompts with their answers are packed; no prompt
    with rollout.response_tokens more may be longer."""
    skip_bad: bool = False
    """Skip (and count) rows that cannot be asked or judged, instead of stopping."""
    skip_solved: bool = False
    """Leave out (and count) prompts whose field pass_rate is 0 or 1, which teach nothing."""
    easy_first: bool = False
    """Ask prompts with a larger pass_rate first, in every pass over them."""
    shares: SHARES = field(default_factory=dict)
    """Environment -> its share of the prompts of every step; none: as many as there are of each."""


@dataclass(config=CHECKED)
class RlTrainOptions(TrainOptions):
    """Optimization, and what happens when."""

    trained: ClassVar[str] = "all"

    max_steps: PositiveInt = 100
    """Optimizer steps of the whole run."""
    global_batch_size: PositiveInt = 512
    """Sampled answers per optimizer step, over all ranks: prompts times rollout.samples."""
    micro_batch_size: PositiveInt = 1
    """Packs of answers per forward pass on one rank."""
    lr: PositiveFloat = 3e-6
    """Peak learning rate."""
    schedule: Literal["wsd", "cosine", "constant"] = "constant"
    """wsd: warm-up, stable, then decay by 1 - sqrt(fraction); cosine; or constant."""
    warmup_steps: NotNegativeInt = 10
    """Steps of linear warm-up."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled weight decay of matrices (not of norms, biases, A_log, D and dt_bias)."""
    beta2: BelowOne = 0.999
    """AdamW beta 2."""
    mtp_loss_weight: NotNegativeFloat = 0.0
    """Weight lambda of the mean over depths of the multi-token-prediction losses on learnt answers,
    which train that block alone; 0: it stays as it is."""
    aux_loss_weight: NotNegativeFloat = 0.0
    """Weight of the sequence-wise load-balancing loss."""
    router_bias_rate: NotNegativeFloat = 0.0
    """Step of the router bias update, once per global batch, where routers are trained."""
    eval_sequences: NotNegativeInt = 256
    """Held-out prompts per evaluation (fewer if there are fewer), each answered once, with the same
    random numbers every time; 0: no evaluation."""
    train_router: bool = False
    """Train the routers' weights too."""


@dataclass(config=CHECKED)
class RlConfig(TrainingConfig):
    """Reinforcement learning of a checkpoint, or resume."""

    run_dir: str = "runs/rl"
    """Directory of the run: resolved configuration, metrics, checkpoints, and at the end the
    model."""
    environments: OPTIONS_BY_NAME = field(default_factory=dict)
    """What judges answers: name -> options, of which kind says what it is (else its name does)."""
    teachers: NAMED = field(default_factory=dict)
    """Checkpoints to learn from, by name, instead of rewards: each token of an answer is worth how
    much more probable its teacher finds it (on-policy distillation)."""
    routes: NAMED = field(default_factory=dict)
    """Environment -> name of the teacher of its prompts; default: of all others."""
    data: PromptOptions = field(default_factory=PromptOptions)
    train: RlTrainOptions = field(default_factory=RlTrainOptions)
    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    rl: PolicyOptions = field(default_factory=PolicyOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)

    @property
    def prompts_per_step(self) -> int:
        return self.train.global_batch_size // self.rollout.samples

    def teacher_of(self, environment: str) -> str:
        """Its name; nothing where there are no teachers."""
        return self.routes.get(environment, self.routes.get("default", ""))

    def in_steps(self) -> RlConfig:
        for name, steps in IN_STEPS.items():
            if getattr(self.train, name) is not None:
                raise UserError(f"train.{name}: nobody knows how long answers become; give {steps}")
        return self

    def validate(self, shape: ModelConfig | None = None) -> None:
        super().validate(shape)
        self.precision.validate(self.train.max_steps)
        train, rl, samples = self.train, self.rl, self.rollout.samples
        pattern, remote = (shape or self.model).pattern, self.rollout.engine != "local"
        idle = {"std": "teachers"} if self.teachers else {}
        if rl.updates == 1:
            alone = "rl.updates 1: set that"
            idle |= dict.fromkeys(("clip", "clip_low", "clip_high", "ratio"), alone)
        if rl.importance == "none":
            idle |= dict.fromkeys(("importance_low", "importance_high"), "rl.importance none")
        refuse(
            (not self.model.from_hf, "model.from_hf is missing: name the checkpoint to train"),
            (not self.data.path, "data.path is missing: name the prompts to learn from"),
            (
                train.tile,
                f"train.tile ({train.tile}) must be 0: passes of rollouts differ between processes",
            ),
            (
                self.parallel.cp > 1,
                f"parallel.cp ({self.parallel.cp}) must be 1: rollouts are sampled and learnt as "
                "whole sequences",
            ),
            (
                rl.router_replay and "E" not in pattern,
                f"rl.router_replay has no effect: no layer of {pattern} is E",
            ),
            (not self.environments, "environments is missing: say what judges the answers"),
            (
                self.rollout.temperature != 1,
                f"rollout.temperature must be 1, got {self.rollout.temperature:g}: answers drawn "
                "at another are not the policy's, and its probabilities are not those they had",
            ),
            (
                samples == 1 and not self.teachers,
                "rollout.samples must be 2 or more: an answer is judged by the others to its "
                "prompt",
            ),
            (
                train.global_batch_size % samples,
                f"train.global_batch_size ({train.global_batch_size} answers) is not divisible by "
                f"rollout.samples ({samples})",
            ),
            (
                self.rollout.response_tokens >= self.data.sequence_length,
                f"rollout.response_tokens ({self.rollout.response_tokens}) leaves no room for "
                f"prompts: raise data.sequence_length ({self.data.sequence_length})",
            ),
            *self.lora.mistakes(train.train_router),
            (
                remote and not _of_server(self.rollout.engine),
                "rollout.engine must be local or begin with http:// or https:// and a host, as in "
                f"http://HOST:PORT, got {self.rollout.engine!r}",
            ),
            (
                remote and self.lora.rank,
                "rollout.engine: a server is given whole weights, no adapters (lora.rank)",
            ),
            (
                remote and rl.router_replay,
                "rollout.engine: no server says which experts tokens went to (rl.router_replay)",
            ),
            (
                train.router_bias_rate and not train.train_router,
                "train.router_bias_rate has no effect without train.train_router",
            ),
            (
                rl.importance_low > rl.importance_high,
                "rl.importance_low exceeds rl.importance_high",
            ),
            *(
                (name in idle, f"rl.{name} has no effect with {idle.get(name)}")
                for name in rl.changed()
            ),
            *((True, why) for why in self._misnamed()),
            (
                bool(self.data.shares) and not sum(self.data.shares.values()),
                "data.shares are all 0",
            ),
            (
                train.eval_sequences and self.data.heldout_path is None,
                "there are no held-out prompts: name data.heldout_path, or set "
                "train.eval_sequences to 0",
            ),
            (train.eval_positions, "train.eval_positions has no effect: rewards are evaluated"),
        )

    def _misnamed(self) -> Iterator[str]:
        """What names environments or teachers that are not there, and who has no teacher."""
        for name in self.environments:
            if self.teachers and not self.teacher_of(name):
                yield f"environment {name} has no teacher: name one in routes, or a default"
        for teacher in self.routes.values():
            if teacher not in self.teachers:
                yield f"routes: there is no teacher {teacher!r} in teachers"
        for option, names in (("routes", self.routes), ("data.shares", self.data.shares)):
            for name in names:
                if name not in (*self.environments, "default"):
                    yield f"{option}: there is no environment {name!r} in environments"


def _of_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.port != 0 and parts.username is None
    except ValueError:  # no port, or no address
        return False
    return known and bool(parts.hostname) and url.isprintable() and " " not in url
