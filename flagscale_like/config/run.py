"""RunConfig: all groups of a run's configuration, and the checks between them."""

from __future__ import annotations

import math
from typing import Literal

import yaml
from pydantic import model_validator

from flagscale_like.arch import Experts, Frozen, ModelArch, groups_on
from flagscale_like.config.groups import (
    Checkpoint,
    Data,
    Kernels,
    Offload,
    Optimizer,
    Parallel,
    PathText,
    Resilience,
    Train,
    parts_of_row,
)
from flagscale_like.config.health import Init, Monitors
from flagscale_like.config.lora import Lora
from flagscale_like.config.objectives import AnyObjective, Contrastive, NextTokenLoss
from flagscale_like.config.rewards import judges
from flagscale_like.config.rl import ReinforcementLearning
from flagscale_like.config.trackers import Logging
from flagscale_like.errors import ConfigError, required


def near_divisors(value: int, number: int) -> str:
    """The nearest divisors of `number` below and above `value`, such as "2 or 4"."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)})
    below = [n for n in divisors if n < value][-1:]
    return " or ".join(map(str, below + [n for n in divisors if n > value][:1]))


def near_multiples(value: int, number: int) -> str:
    """The nearest multiples of `number` below and above `value`, such as "32 or 34"; without 0."""
    below = value // number * number
    return " or ".join(str(n) for n in (below, below + number) if n > 0)


def tp_misfit(model: ModelArch, tp: int) -> str | None:
    """Why tensor parallelism over `tp` ranks cannot cut the model; None where it can."""
    for name in ("num_attention_heads", "ffn_hidden_size"):
        if getattr(model, name) % tp:
            return f"model.{name} ({getattr(model, name)}) must be divisible by parallel.tp ({tp})"
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        return f"model.num_query_groups ({groups}) must be divisible by parallel.tp ({tp}), or divide it"
    if model.qk_norm_over == "projection" and groups % tp:
        return f"model.num_query_groups ({groups}) must be divisible by parallel.tp ({tp}) with qk_norm_over projection"
    rows = (model.num_attention_heads + 2 * groups) * model.head_dim
    if rows % tp:
        return f"the {rows} rows of q, k and v must be divisible by parallel.tp ({tp})"
    return None


def check_layout(model: ModelArch, par: Parallel, seq_length: int) -> None:
    """Check that a layout divides the model, and that a sequence is not longer than its positions are made for.

    Raises:
        ValueError: a number does not divide another, or the sequence is too long. The message names both numbers and the
            nearest valid ones.
    """
    if misfit := tp_misfit(model, par.tp):
        fitting = [tp for tp in range(1, model.num_attention_heads + 1) if not tp_misfit(model, tp)]
        near = [tp for tp in fitting if tp < par.tp][-1:] + [tp for tp in fitting if tp > par.tp][:1]
        raise ValueError(f"{misfit}: tp {' or '.join(map(str, near))} would do")
    _check_experts(model.experts, par)
    _check_sequence(model, par, seq_length)
    _check_stages(model.num_layers, par)
    if model.longest_sequence and seq_length > model.longest_sequence:
        scaled = model.longest_sequence != model.max_position_embeddings
        raise ValueError(
            f"train.seq_length ({seq_length}) exceeds model.max_position_embeddings ({model.max_position_embeddings})"
            + (f", {model.longest_sequence} with model.position.scaling" if scaled else "")
        )


def _check_experts(experts: Experts | None, par: Parallel) -> None:
    if experts is None:
        if par.ep > 1:
            raise ValueError(f"parallel.ep ({par.ep}) needs model.experts: a dense model has no experts to spread")
        return
    if experts.count % par.ep:
        raise ValueError(
            f"model.experts.count ({experts.count}) must be divisible by parallel.ep ({par.ep}): "
            f"ep {near_divisors(par.ep, experts.count)} would do"
        )
    if par.tp > 1 and not par.sp:
        raise ValueError(
            f"model.experts with parallel.tp ({par.tp}) needs parallel.sp true: without it every tensor-parallel rank would "
            "send the same tokens to the experts"
        )
    if experts.shared_ffn_hidden_size % par.tp:
        raise ValueError(
            f"model.experts.shared_ffn_hidden_size ({experts.shared_ffn_hidden_size}) must be divisible by parallel.tp "
            f"({par.tp}): tp {near_divisors(par.tp, experts.shared_ffn_hidden_size)} would do"
        )


def _check_sequence(model: ModelArch, par: Parallel, seq_length: int) -> None:
    groups = groups_on(model.num_query_groups, par.tp)
    if par.cp_kind == "a2a" and groups % par.cp:
        raise ValueError(
            f"model.num_query_groups / parallel.tp ({model.num_query_groups}/{par.tp}) must be divisible by parallel.cp "
            f"({par.cp}) with cp_kind a2a: cp {near_divisors(par.cp, groups)} would do, or cp_kind gather"
        )
    if model.attention == "bidirectional" and par.cp > 1 and par.cp_kind == "gather":
        raise ValueError(
            f"parallel.cp ({par.cp}) with cp_kind gather computes causal attention, and model.attention is bidirectional: "
            "use cp_kind a2a, or cp 1"
        )
    chunks = parts_of_row(par.cp, par.cp_kind)
    factors = {
        f"{'2 * ' if chunks > par.cp else ''}parallel.cp ({par.cp})": chunks,
        f"parallel.tp ({par.tp}) with sp": par.tp if par.sp else 1,
    }
    parts = math.prod(factors.values())
    if seq_length % parts:
        given = " * ".join(name for name, factor in factors.items() if factor > 1)
        raise ValueError(
            f"train.seq_length ({seq_length}) must be divisible by {given}: "
            f"seq_length {near_multiples(seq_length, parts)} would do"
        )


def _check_stages(layers: int, par: Parallel) -> None:
    first, last = par.first_stage_layers, par.last_stage_layers
    rest, stages = layers - (first or 0) - (last or 0), par.pp - bool(first) - bool(last)
    if not (first or last):
        if layers % (par.pp * par.vpp):
            near = near_divisors(par.pp, layers // par.vpp) if layers % par.vpp == 0 else ""
            way_out = f"pp {near} would do" if near else f"vpp {near_divisors(par.vpp, layers)} may do"
            raise ValueError(f"model.num_layers ({layers}) must be divisible by pp*vpp ({par.pp}*{par.vpp}): {way_out}")
    elif (stages == 0 and rest) or (stages and (rest <= 0 or rest % stages)):
        raise ValueError(
            f"model.num_layers ({layers}) less first_stage_layers ({first or 0}) and last_stage_layers ({last or 0}) "
            f"must be divisible by the other stages ({stages})"
        )


class RunConfig(Frozen):
    """The complete configuration of a run.

    Attributes:
        task: `train` learns from data by `objective`, `rl` from rewards by the group `rl`.
        run_dir: folder of everything that the run writes: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, loss.png
            and more. A run whose folder has checkpoints resumes from the newest one.
        model: shape of the model.
        parallel: degrees of parallelism.
        train: training loop.
        optimizer: optimizer and learning-rate schedule.
        data: training data.
        objective: what the run learns.
        rl: reinforcement learning, with task rl.
        checkpoint: checkpoints.
        kernels: implementation of each operator.
        monitors: monitors, and the reaction to anomalies.
        resilience: timeouts and signals.
        offload: activation offload to host memory.
        init: initialisation of the weights.
        lora: train low-rank adapters instead of the weights.
        logging: experiment trackers.
    """

    task: Literal["train", "rl"] = "train"
    run_dir: PathText
    model: ModelArch
    parallel: Parallel = Parallel()
    train: Train
    optimizer: Optimizer
    data: Data
    objective: AnyObjective = NextTokenLoss()
    rl: ReinforcementLearning | None = None
    checkpoint: Checkpoint = Checkpoint()
    kernels: Kernels = Kernels()
    monitors: Monitors = Monitors()
    resilience: Resilience = Resilience()
    offload: Offload | None = None
    init: Init = Init()
    lora: Lora | None = None
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        par, train = self.parallel, self.train
        check_layout(self.model, par, train.seq_length)
        if self.offload and isinstance(self.offload.share, list) and len(self.offload.share) != par.pp:
            raise ValueError(
                f"offload.share lists {len(self.offload.share)} stages, parallel.pp is {par.pp}: give one share for each "
                "stage"
            )
        if train.global_batch_size % train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({train.global_batch_size}) must be divisible by "
                f"train.micro_batch_size ({train.micro_batch_size}): micro_batch_size "
                f"{near_divisors(train.micro_batch_size, train.global_batch_size)} would do"
            )
        if self.init.mup and self.model.latent_attention:
            raise ValueError(
                "init.mup has no rule for model.latent_attention, whose inner widths do not grow with hidden_size: leave "
                "init.mup out"
            )
        if self.init.mup and self.model.tie_embeddings:
            raise ValueError(
                "init.mup needs model.tie_embeddings false: muP scales the embedding and the output layer differently"
            )
        objective = self.objective
        if self.data.synthetic is True and objective.kind == "next_token" and objective.per == "conversation":
            raise ValueError("objective.per conversation needs conversations: data.synthetic conversations has some")
        if self.data.synthetic == "conversations" and objective.reads != "text":
            raise ValueError(
                f"data.synthetic conversations is for objective.kind next_token: {objective.kind} reads {objective.reads}, "
                "which data.synthetic true makes up"
            )
        if self.init.salience and train.frozen:
            raise ValueError("init.salience scales weights by their gradients: train.frozen must be empty with it")
        self._check_lora()
        if self.model.attention == "bidirectional" and objective.head != "hidden":
            raise ValueError(
                f"model.attention bidirectional lets a token see those after it, which objective.kind {objective.kind} asks "
                "for: use attention causal, or objective.kind contrastive"
            )
        if self.objective.reads == "pairs":
            self._check_pairs()
        if isinstance(objective, Contrastive):
            self._check_groups(objective)
        self._check_rl()
        self._check_schedule()
        return self

    def _check_lora(self) -> None:
        if self.lora is None:
            return
        self.lora.check(self.model)
        if self.train.frozen:
            raise ValueError("lora trains nothing but its adapters: train.frozen must be empty with it")
        if self.init.mup or self.init.salience:
            name = "mup" if self.init.mup else "salience"
            raise ValueError(
                f"init.{name} is for weights that are drawn and trained; with lora they are loaded and stay"
            )
        ranks = self.monitors.effective_rank
        if ranks and set(ranks.of) - {"activations"}:
            raise ValueError(
                "monitors.effective_rank: weights and gradients are of the model's matrices, which lora does not train: "
                "give of: [activations]"
            )

    def _check_rl(self) -> None:
        if (self.task == "rl") != (self.rl is not None):
            given = "task rl needs the group rl" if self.task == "rl" else "the group rl needs task: rl"
            raise ValueError(given)
        if (self.task == "rl") != bool(self.data.prompts):
            given = "task rl reads data.prompts" if self.task == "rl" else "data.prompts is for task: rl"
            raise ValueError(f"{given}: files of prompts, as docs/rl.md describes them")
        if self.rl is None:
            if self.data.eval_prompts:
                raise ValueError("data.eval_prompts are for task: rl; data.split says what another run is evaluated on")
            return
        train = self.train
        unfit = {
            "objective": self.objective != NextTokenLoss(),
            "train.ramp_up": train.ramp_up is not None,
            "train.eval_interval without data.eval_prompts": bool(train.eval_interval and not self.data.eval_prompts),
            "data.selection": self.data.selection is not None,
            "init.salience": self.init.salience is not None,
            "offload": self.offload is not None,
        }
        if named := [name for name, given in unfit.items() if given]:
            raise ValueError(f"{named[0]} is not for task rl: leave it out")
        if train.eval_interval and judges(self.rl.reward):
            raise ValueError(
                "train.eval_interval: a judge compares the policy's answers with each other, and their mean says nothing of "
                "the policy: leave it out, or give another reward"
            )
        if self.rl.rollout.engine == "vllm" and self.lora is not None:
            raise ValueError(
                "rl.rollout.engine vllm gets whole weights, and lora's adapters are not merged into them: use engine own or "
                "refit"
            )
        self.rl.check_run(rollouts=train.global_batch_size, places=train.seq_length)

    def _check_pairs(self) -> None:
        kind, data = f"objective.kind {self.objective.kind}", self.data
        if data.prepare and data.prepare.chat is None:
            raise ValueError(
                f"{kind} reads pairs of answers, which data.prepare without data.prepare.chat has not: make a source with "
                "`data pairs`"
            )
        if data.synthetic and self.train.seq_length < 8:
            raise ValueError(
                f"data.synthetic makes up rows of pairs of 8 tokens or more: train.seq_length is {self.train.seq_length}"
            )
        if self.init.salience:
            raise ValueError(f"init.salience is for new weights that learn text: leave it out with {kind}")
        if data.selection and data.selection.rule == "target" and getattr(self.objective, "reference", "") == "stored":
            raise ValueError(
                f"data.selection.rule target has no log-probabilities of the reference for its held-out set: use another "
                f"rule with {kind}, or objective.reference none"
            )

    def _check_groups(self, objective: Contrastive) -> None:
        kind, data = f"objective.kind {objective.kind}", self.data
        if data.prepare:
            raise ValueError(f"{kind} reads groups, which data.prepare has not: make a source with `data groups`")
        if data.synthetic and self.train.seq_length <= objective.passages:
            raise ValueError(
                f"train.seq_length ({self.train.seq_length}) has no room for a query and {objective.passages} passages "
                "(objective.passages)"
            )
        if self.init.salience:
            raise ValueError(f"init.salience is for new weights that learn text: leave it out with {kind}")
        if max(objective.dimensions, default=0) > self.model.hidden_size:
            raise ValueError(
                f"objective.dimensions ({list(objective.dimensions)}) exceed model.hidden_size "
                f"({self.model.hidden_size}), the size of a whole vector"
            )
        if self.one_source_batches and (data.selection or self.train.ramp_up):
            given = "data.selection draws each row by itself" if data.selection else "train.ramp_up changes the batch"
            raise ValueError(
                f"{given}, and objective.same_source gives each batch one source: set objective.same_source to false, or "
                "leave the other out"
            )

    def _check_schedule(self) -> None:
        optimizer, steps = self.optimizer, self.train.steps
        if optimizer.warmup_steps >= steps:
            raise ValueError(
                f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than train.steps ({steps}): add "
                f"optimizer.warmup_steps={steps // 10}; or keep train.steps, and stop with train.exit_at_step={steps}"
            )
        if optimizer.schedule == "wsd" and optimizer.decay_steps is None:
            raise ValueError("optimizer.schedule wsd needs optimizer.decay_steps")
        if optimizer.schedule == "wsd" and optimizer.decay_steps is not None and optimizer.decay_steps > steps:
            raise ValueError(
                f"optimizer.decay_steps ({optimizer.decay_steps}) exceeds train.steps ({steps}): add "
                f"optimizer.decay_steps={max(1, steps // 5)}; or keep train.steps, and stop with train.exit_at_step={steps}"
            )

    def data_parallel_size(self, world_size: int) -> int:
        """Compute the data-parallel degree on `world_size` ranks.

        Raises:
            ConfigError: the world size, the batch sizes or the ramp-up do not fit the layout.
        """
        par, train = self.parallel, self.train
        world_size -= self.ranks_apart
        if self.ranks_apart and (world_size < par.smallest_world or self.ranks_apart % par.smallest_world):
            raise ConfigError(
                f"rl.rollout.apart ({self.ranks_apart}) leaves {world_size} ranks that learn: both must be multiples of "
                f"{par.divisor}, and above 0"
            )
        if world_size % par.smallest_world:
            raise ConfigError(
                f"world size ({world_size}) must be divisible by {par.divisor}: "
                f"start {near_multiples(world_size, par.smallest_world)} processes, or change parallel.*"
            )
        dp = world_size // par.model_parallel_size
        per_pass = train.micro_batch_size * dp
        sizes = {"train.global_batch_size": train.global_batch_size}
        if train.ramp_up:
            sizes |= {"train.ramp_up.start": train.ramp_up.start, "train.ramp_up.increment": train.ramp_up.increment}
        for name, size in sizes.items():
            if size % per_pass:
                raise ConfigError(
                    f"{name} ({size}) must be divisible by micro_batch_size*dp ({train.micro_batch_size}*{dp}): "
                    f"{near_multiples(size, per_pass)} would do"
                )
            if par.vpp > 1 and (size // per_pass) % par.pp:
                raise ConfigError(
                    f"{name} ({size}) gives {size // per_pass} micro-batches, which must be a multiple of pp ({par.pp}) "
                    f"with vpp ({par.vpp}): {near_multiples(size, per_pass * par.pp)} would do"
                )
        if train.ramp_up:
            if train.ramp_up.start > train.global_batch_size:
                raise ConfigError(
                    f"train.ramp_up.start ({train.ramp_up.start}) exceeds train.global_batch_size "
                    f"({train.global_batch_size})"
                )
            if (train.global_batch_size - train.ramp_up.start) % train.ramp_up.increment:
                raise ConfigError(
                    f"train.global_batch_size ({train.global_batch_size}) less train.ramp_up.start "
                    f"({train.ramp_up.start}) must be divisible by train.ramp_up.increment ({train.ramp_up.increment})"
                )
        return dp

    @property
    def required_rl(self) -> ReinforcementLearning:
        """The group rl, of a run with task rl."""
        return required(self.rl, "the group rl")

    @property
    def required_contrast(self) -> Contrastive:
        """The objective, of a run that reads groups."""
        return required(
            self.objective if isinstance(self.objective, Contrastive) else None, "objective.kind contrastive"
        )

    @property
    def ranks_apart(self) -> int:
        """Ranks of a launch that only draw rollouts; see Drawing.apart."""
        return self.rl.rollout.apart if self.rl is not None else 0

    def flops_per_token(self, *, causal: bool = False) -> float:
        """Model FLOPs of one token's forward and backward; see ModelArch.flops_per_token()."""
        adapters = self.lora.parameters(self.model) if self.lora is not None else ()
        options = {"adapters": adapters, "output_layer": self.objective.head == "language_model"}
        return self.model.flops_per_token(self.train.seq_length, causal=causal, **options)

    def describe_parameters(self) -> str:
        """How many parameters the model has, and how many of them LoRA trains, in words."""
        count = self.model.parameter_count()
        if self.objective.head == "hidden" and not self.model.tie_embeddings:
            count -= self.model.vocab_size * self.model.hidden_size  # there is no output layer
        if self.lora is None:
            active = f", {self.model.active_parameter_count():,} of them for each token" if self.model.experts else ""
            return f"{count:,} parameters{active}"
        own = sum(parameter.numel for parameter in self.lora.parameters(self.model))
        return f"trained parameters {own:,} of {count + own:,} ({own / (count + own):.2%}, LoRA)"

    @property
    def one_source_batches(self) -> bool:
        """Whether each global batch is of one of several sources; see Contrastive.same_source."""
        objective = self.objective
        return isinstance(objective, Contrastive) and objective.same_source and len(self.data.sources) > 1

    def planned_samples(self) -> int:
        """Samples that the run may read: those of all its steps, and a reserve for the steps that rewinds repeat."""
        monitors, reserve = self.monitors, 0
        if monitors.may_rewind:
            steps_again = min(monitors.rewind_steps + self.checkpoint.interval, self.train.steps)
            reserve = monitors.max_rewinds * steps_again * self.train.global_batch_size
        return self.train.total_samples() + reserve

    def to_yaml(self) -> str:
        """The configuration as YAML, with all defaults."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
