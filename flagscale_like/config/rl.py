"""The group `rl`: what a run of `task: rl` learns from, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen
from flagscale_like.config.groups import PathText
from flagscale_like.config.rewards import ModelReward, Outside, Reward, Rounds, judges, model_in, sources_of

Algorithm = Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce++"]
GROUPED: tuple[Algorithm, ...] = ("grpo", "dr_grpo", "rloo")


class Vllm(Frozen):
    """vLLM, with rollout.engine vllm. Each rank has one on its own device, which gets the weights from there.

    Attributes:
        memory: the share of the device that it may take while it draws; it gives all of it back for learning.
    """

    memory: float = Field(default=0.4, gt=0, lt=1)


class Drawing(Frozen):
    """How rollouts are drawn.

    Attributes:
        engine: what draws them: `own` generates with the trainer's weights in place, on the layout of training; `refit` with
            a whole copy of the policy on each rank, which exists while rollouts are drawn; `vllm` with vLLM on each rank's
            device (not yet run on a GPU).
        vllm: options of engine vllm.
        samples: rollouts of each prompt. The group algorithms compare them, and need 2 or more.
        max_new_tokens: the most tokens that are drawn after a prompt.
        temperature: divides the logits, in drawing and in training alike; above 0.
        top_p: draw among the likeliest tokens that together have this probability. The trainer's probabilities are of all
            tokens, so that a value below 1 biases the ratio of the two.
        top_k: draw among so many of the likeliest tokens; 0: among all.
        stop_strings: texts that end a rollout, beside the tokenizer's end of text.
        apart: ranks that only draw, the last ones of the launch, while the others learn; they have the same layout. 0: all
            ranks draw and learn in turns. Needs staleness 1.
        rows: the most rollouts that are under way at a time: with engine own on each copy of the policy, with refit on each
            rank; vLLM decides itself.
        training_sleeps: while rollouts are drawn, the gradient buffers of policy and critic are freed, and where the device
            has memory of its own, their optimizer states wait in host memory. Not with `apart`, whose ranks learn meanwhile.
    """

    engine: Literal["own", "refit", "vllm"] = "own"
    vllm: Vllm = Vllm()
    samples: int = Field(default=1, gt=0)
    max_new_tokens: int = Field(gt=0)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    stop_strings: tuple[str, ...] = ()
    apart: int = Field(default=0, ge=0)
    rows: int = Field(default=64, gt=0)
    training_sleeps: bool = True

    @model_validator(mode="after")
    def _check(self) -> Drawing:
        if self.engine != "vllm":
            if self.vllm != Vllm():
                raise ValueError(f"vllm is for engine vllm, and engine is {self.engine}: leave it out")
            return self
        if self.top_p < 1 or self.top_k:
            raise ValueError(
                f"engine vllm gives no log-probabilities without top_p ({self.top_p:g}) and top_k ({self.top_k}), which the "
                "trainer compares with: use top_p 1 and top_k 0, or engine own or refit"
            )
        if self.rows != type(self).model_fields["rows"].default:
            raise ValueError(f"rows ({self.rows}) is for the engines own and refit, vLLM decides itself: leave it out")
        return self


class Divergence(Frozen):
    """The penalty on the distance from the reference, which is the policy as the run begins.

    With d the log-probability of a token under the policy less that under the reference (Schulman 2020):

    Attributes:
        coefficient: factor on the penalty; 0 keeps no reference.
        into: `reward` subtracts the penalty from each token's reward (Ziegler et al. 2019); `loss` adds it to the loss (Shao
            et al. 2024).
        estimator: `k1` is d; `k3` is exp(-d) - 1 + d, which is never negative.
        target: nats a rollout that the coefficient is steered to (Ziegler et al. 2019, section 2.2); without it the
            coefficient stays.
        horizon: rollouts over which the coefficient is steered.
        memory: where the reference's weights lie between two scorings. `device` keeps them beside the policy's; `host`
            exchanges them with the policy's for the time of a scoring; `auto` is host where the device has memory of its own.
            With LoRA there are no such weights: the reference is the policy with its adapters off.
    """

    coefficient: float = Field(default=0.05, ge=0)
    into: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k3"] = "k1"
    target: float | None = Field(default=None, gt=0)
    horizon: int = Field(default=10_000, gt=0)
    memory: Literal["auto", "device", "host"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Divergence:
        if self.into == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator k1 in the loss has a gradient whose mean is 0, and restrains nothing: give estimator k3, or into "
                "reward"
            )
        if self.target is not None and not self.coefficient:
            raise ValueError("target steers the coefficient, and coefficient 0 stays 0: give a coefficient above 0")
        return self


class Clip(Frozen):
    """How far one iteration may move the policy and the values from where they were when the rollouts were scored.

    Attributes:
        low, high: the ratio of new and old probability counts within 1 - low and 1 + high (Schulman et al. 2017; with high
            above low, DAPO, Yu et al. 2025).
        dual: with a negative advantage, the loss is at most this multiple of its size (Ye et al. 2020, section 4.2).
        value: a value counts within this distance of its old one; without it, wherever it is.
    """

    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.2, gt=0)
    dual: float | None = Field(default=None, gt=1)
    value: float | None = Field(default=0.2, gt=0)


class Critic(Frozen):
    """The model of the values, which PPO trains beside the policy. All its weights are trained, at the policy's schedule.

    Attributes:
        lr: its peak learning rate.
        load: a checkpoint or a Hugging Face folder that it begins from, such as a reward model; without it, the policy's
            weights with a new head.
        gae_lambda: of its returns; 1 makes them the rewards to come (VAPO, Yuan et al. 2025).
    """

    lr: float = Field(default=1e-5, gt=0)
    load: PathText | None = None
    gae_lambda: float = Field(default=1.0, ge=0, le=1)


class Evaluating(Frozen):
    """How data.eval_prompts are answered, every train.eval_interval iterations.

    Attributes:
        samples: answers to each prompt.
        temperature: divides the logits; 0 takes the likeliest token.
    """

    samples: int = Field(default=1, gt=0)
    temperature: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Evaluating:
        if self.samples > 1 and not self.temperature:
            raise ValueError(
                f"evaluation.temperature 0 gives the same answer {self.samples} times: give one above 0, or samples 1"
            )
        return self


class Overlong(Frozen):
    """DAPO's overlong shaping (Yu et al. 2025, equation 13): a rollout that comes near its room loses reward.

    Attributes:
        buffer: tokens before rollout.max_new_tokens within which the penalty grows from 0 to `penalty`.
        penalty: of a rollout that fills the room.
    """

    buffer: int = Field(gt=0)
    penalty: float = Field(default=1.0, gt=0)


class ReinforcementLearning(Frozen):
    """Reinforcement learning from rewards. A step of the run is one iteration: rollouts are drawn, scored and learned from.

    train.global_batch_size counts the rollouts of an iteration, train.seq_length the tokens of a row, which holds several
    rollouts with their prompts, and train.micro_batch_size rows.

    Attributes:
        algorithm: where a token's advantage comes from; see rl.algorithms. `ppo` has a critic; `grpo`, `dr_grpo` and `rloo`
            compare the rollouts of a prompt; `reinforce++` compares the batch.
        rollout: how rollouts are drawn.
        reward: what scores them.
        outside: the guard on exploration, for rewards of a reward model.
        rounds: rounds, in which the reward model is renewed between iterations.
        kl: the penalty on the distance from the reference.
        clip: how far one iteration may move the models.
        critic: the model of the values, for `ppo`.
        gamma: discount of later rewards.
        gae_lambda: of the policy's advantages (Schulman et al. 2016), for `ppo`.
        epochs: how often an iteration's rollouts are learned from.
        minibatches: optimizer steps of an epoch. The rollouts are divided among them anew in each epoch.
        mean: what has the same weight in the loss: each `token`, or each `rollout`, whose loss is the mean of its tokens.
            Without it, as in the algorithm's paper: rollout for `grpo`, token otherwise. (`dr_grpo` divides the sum by the
            rollouts times max_new_tokens.)
        old: where the log-probabilities of the rollouts come from that the ratio's denominator is made of: `engine` takes
            those of drawing; `trainer` computes them again, and weighs each token by what lies between the two.
        importance_cap: the largest such weight (truncated importance sampling, Yao et al. 2025).
        staleness: iterations between the weights that draw and those that learn. 1 draws the next rollouts before it learns
            from the last ones.
        dynamic_sampling: replace groups whose scores are all equal, which teach nothing (DAPO, Yu et al. 2025).
        max_refills: how often the drawing goes on in an iteration to replace what was left out.
        overlong: overlong shaping.
        evaluation: how held-out prompts are answered.
        template: file of the chat template (Jinja) for prompts that are messages; without it, that of data.tokenizer.
    """

    algorithm: Algorithm = "ppo"
    rollout: Drawing
    reward: Reward
    outside: Outside = Outside()
    rounds: Rounds = Rounds()
    kl: Divergence = Divergence()
    clip: Clip = Clip()
    critic: Critic = Critic()
    gamma: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    epochs: int = Field(default=1, gt=0)
    minibatches: int = Field(default=1, gt=0)
    mean: Literal["token", "rollout"] | None = None
    old: Literal["engine", "trainer"] = "trainer"
    importance_cap: float = Field(default=2.0, ge=1)
    staleness: Literal[0, 1] = 0
    dynamic_sampling: bool = False
    max_refills: int = Field(default=4, ge=0)
    overlong: Overlong | None = None
    evaluation: Evaluating = Evaluating()
    template: PathText | None = None

    @property
    def has_critic(self) -> bool:
        """Whether a model of the values is trained."""
        return self.algorithm == "ppo"

    @property
    def guard(self) -> str:
        """What the guard on exploration does: outside.action, or what it is where it is not given."""
        return self.outside.action or ("clamp" if model_in(self.reward) is not None else "off")

    @model_validator(mode="after")
    def _check(self) -> ReinforcementLearning:
        drawing, name = self.rollout, self.algorithm
        if drawing.temperature == 0:
            raise ValueError(
                "rollout.temperature 0 draws the same rollout every time, and its probability is 1: give one above 0"
            )
        if drawing.samples == 1 and (name in GROUPED or self.dynamic_sampling):
            what = f"algorithm {name}" if name in GROUPED else "dynamic_sampling"
            raise ValueError(f"{what} compares the rollouts of a prompt, and rollout.samples is 1: give 2 or more")
        if drawing.samples == 1 and judges(self.reward):
            raise ValueError("a judge compares the rollouts of a prompt, and rollout.samples is 1: give 2 or more")
        if self.guard != "off" and model_in(self.reward) is None:
            raise ValueError(
                f"outside.action {self.outside.action} guards a reward model, and rl.reward has none, or several: "
                "leave outside out, or give one"
            )
        if self.guard != "off" and self.outside.kl is not None and (self.staleness or not self.kl.coefficient):
            why = "staleness 1 measures it after the guard" if self.staleness else "kl.coefficient 0 keeps none"
            raise ValueError(f"outside.kl bounds the log-ratio to the reference, and {why}: leave outside.kl out")
        nameless = any(isinstance(source, ModelReward) and source.path is None for source in sources_of(self.reward))
        if nameless and not self.rounds.count:
            raise ValueError("reward.path is not given: name a reward model, or have rounds make one")
        if self.rounds.count and model_in(self.reward) is None:
            raise ValueError(
                "rounds renew the one reward model of rl.reward, which has none, or several: give reward.kind model"
            )
        if self.overlong and self.overlong.buffer > drawing.max_new_tokens:
            raise ValueError(
                f"overlong.buffer ({self.overlong.buffer}) exceeds rollout.max_new_tokens ({drawing.max_new_tokens})"
            )
        if drawing.apart and not self.staleness:
            raise ValueError(
                f"rollout.apart ({drawing.apart}) draws on some ranks while the others learn from what earlier weights drew: "
                "give staleness 1"
            )
        if self.dynamic_sampling and not self.max_refills:
            raise ValueError("dynamic_sampling draws again for what it leaves out: max_refills must be above 0")
        if self.algorithm == "dr_grpo" and self.mean is not None:
            raise ValueError("dr_grpo has a mean of its own: leave `mean` out, or use grpo")
        return self

    def check_run(self, *, rollouts: int, places: int) -> None:
        """Check the numbers of rollouts against each other, and ranks that only draw against rounds.

        Args:
            rollouts: train.global_batch_size.
            places: train.seq_length.

        Raises:
            ValueError: a number does not divide another, a row has no room for a rollout, or rounds have ranks apart.
        """
        samples, parts = self.rollout.samples, self.minibatches
        if self.rollout.apart and self.rounds.count:
            raise ValueError(
                f"rl.rollout.apart ({self.rollout.apart}) is for a run without rl.rounds, whose phases need all ranks: leave "
                "one of them out"
            )
        if rollouts % samples:
            raise ValueError(
                f"train.global_batch_size ({rollouts}) counts the rollouts of an iteration: it must be divisible by "
                f"rl.rollout.samples ({samples})"
            )
        if rollouts % parts:
            raise ValueError(f"train.global_batch_size ({rollouts}) must be divisible by rl.minibatches ({parts})")
        if self.rollout.max_new_tokens >= places:
            raise ValueError(
                f"rl.rollout.max_new_tokens ({self.rollout.max_new_tokens}) leaves a prompt no room in train.seq_length "
                f"({places})"
            )
