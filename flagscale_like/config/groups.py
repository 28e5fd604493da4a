"""The groups of a run's configuration: what each key means, its default, and what it may be."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from flagscale_like.arch import Frozen
from flagscale_like.config.health import Selection

KernelChoice = Literal["auto", "triton", "torch"]


class Parallel(Frozen):
    """Degrees of parallelism. Data parallelism is what is left of the world size.

    Attributes:
        tp: tensor parallel (Shoeybi et al. 2019).
        pp: pipeline stages.
        vpp: model chunks a stage holds in the interleaved schedule (Narayanan et al. 2021); 1 is plain 1F1B.
        sp: sequence parallelism over the tensor-parallel group (Korthikanti et al. 2022).
        cp: context parallelism; reserved, 1.
        ep: expert parallelism; reserved, 1.
        first_stage_layers, last_stage_layers: layers of the first and last stage where they differ from the others.
    """

    tp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    vpp: int = Field(default=1, gt=0)
    sp: bool = False
    cp: Literal[1] = 1
    ep: Literal[1] = 1
    first_stage_layers: int | None = Field(default=None, gt=0)
    last_stage_layers: int | None = Field(default=None, gt=0)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @model_validator(mode="after")
    def _check(self) -> Parallel:
        if self.sp and self.tp == 1:
            raise ValueError(
                "sp: true needs tp > 1 (tp is 1): sequence parallelism splits over the tensor-parallel group"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp ({self.vpp}) needs pp > 1 (pp is 1)")
        if self.pp == 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ValueError("first_stage_layers and last_stage_layers need pp > 1 (pp is 1)")
        if self.vpp > 1 and (self.first_stage_layers or self.last_stage_layers):
            raise ValueError(f"first_stage_layers and last_stage_layers need vpp 1 (vpp is {self.vpp})")
        return self


class RampUp(Frozen):
    """Batch-size ramp-up: from `start`, by `increment`, over `samples` samples."""

    start: int = Field(gt=0)
    increment: int = Field(gt=0)
    samples: int = Field(gt=0)


class Profile(Frozen):
    """A torch profiler trace, one file a rank, under RUN_DIR/profile.

    Attributes:
        steps: the first and the last step to record, counted from 1.
    """

    steps: tuple[int, int]

    @model_validator(mode="after")
    def _check(self) -> Profile:
        first, last = self.steps
        if not 1 <= first <= last:
            raise ValueError(f"profile.steps ({first}, {last}) must be a first and a last step, counted from 1")
        return self


class Train(Frozen):
    """The loop. Sizes count sequences; `steps` counts optimizer steps.

    Attributes:
        profile: write a torch profiler trace of some steps.
        exit_at_step: save and stop after this step; learning rate and data stay planned for `steps`.
        recompute: activations recomputed in the backward pass: `selective` the attention core, `full` every layer.
        log_interval, eval_interval: steps between log lines and evaluations; eval_interval 0 evaluates never.
        eval_steps: global batches an evaluation reads.
        frozen: shell patterns of parameter names that training leaves as they are: `embedding.*`, `decoder.layers.0.*`.
        gc_interval: steps between Python's garbage collections, at the same step on every rank; 0 leaves them to Python.
    """

    steps: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    seq_length: int = Field(gt=0)
    seed: int = Field(default=1234, ge=0)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    ramp_up: RampUp | None = None
    profile: Profile | None = None
    exit_at_step: int | None = Field(default=None, gt=0)
    log_interval: int = Field(default=1, gt=0)
    eval_interval: int = Field(default=0, ge=0)
    eval_steps: int = Field(default=10, gt=0)
    frozen: list[str] = Field(default_factory=list)
    gc_interval: int = Field(default=100, ge=0)

    def batch_size_at(self, consumed: int) -> int:
        """Global batch size of the step that follows `consumed` samples: equal stretches of samples an increment."""
        ramp = self.ramp_up
        if ramp is None or consumed >= ramp.samples:
            return self.global_batch_size
        increments = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (consumed * increments // ramp.samples)

    def total_samples(self) -> int:
        """Samples that `steps` steps consume."""
        consumed = step = 0
        if self.ramp_up is not None:
            while step < self.steps and consumed < self.ramp_up.samples:
                consumed += self.batch_size_at(consumed)
                step += 1
        return consumed + (self.steps - step) * self.global_batch_size


class Optimizer(Frozen):
    """AdamW with ZeRO-1 sharding (megatron-core's distributed optimizer) and the learning-rate schedule.

    Attributes:
        warmup_steps: linear warm-up from 0 to `lr`.
        schedule: `wsd` is constant, then a linear decay over the last `decay_steps` steps.
        clip_grad: largest global gradient norm; 0 does not clip.
        initial_loss_scale: of the dynamic loss scaler; fp16 only.
    """

    lr: float = Field(gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)
    initial_loss_scale: float = Field(default=2.0**16, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Optimizer:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        return self


class Source(Frozen):
    """One source of a blend: a prefix of .bin/.idx files and its weight.

    Attributes:
        name: what reports call it; the prefix's last part, if left out.
    """

    path: str
    weight: float = Field(default=1.0, gt=0)
    name: str | None = None


class Prepare(Frozen):
    """Raw text that is turned into .bin/.idx under the run folder before the first step, once.

    Attributes:
        input: files, folders or globs; `python-stdlib` is the running Python's own source.
        tokenizer_vocab_size: trains a byte-level BPE of this size on the input, where data.tokenizer is not given.
    """

    input: list[str] = Field(min_length=1)
    tokenizer_vocab_size: int | None = Field(default=None, ge=257)


class Data(Frozen):
    """What to train on: prepared sources, or raw text to prepare; `synthetic: true` needs neither.

    Attributes:
        split: shares of documents for training, validation and test. Where evaluations are on and there is a test share,
            its loss is reported once, after the last step.
        num_workers: loader processes a rank; 0 loads in the training process.
        cache_dir: the sample index is kept here; the run folder where it is left out.
        selection: let the sources' weights follow the model; off where it is left out.
    """

    sources: list[Source] = Field(default_factory=list)
    prepare: Prepare | None = None
    synthetic: bool = False
    tokenizer: str | None = None
    split: str = "98,2,0"
    num_workers: int = Field(default=0, ge=0)
    cache_dir: str | None = None
    selection: Selection | None = None

    @property
    def tests(self) -> bool:
        """Whether documents are set aside for a test."""
        return float(self.split.split(",")[2]) > 0

    @property
    def source_names(self) -> list[str]:
        """What reports call the sources; the whole prefix where two would share a name."""
        names = [source.name or source.path.rstrip("/").rpartition("/")[2] for source in self.sources]
        return [s.path if names.count(n) > 1 else n for n, s in zip(names, self.sources, strict=True)]

    @model_validator(mode="after")
    def _check(self) -> Data:
        given = sum((bool(self.sources), self.prepare is not None, self.synthetic))
        if given != 1:
            raise ValueError(f"give exactly one of sources, prepare and synthetic ({given} given)")
        if self.prepare and not (self.tokenizer or self.prepare.tokenizer_vocab_size):
            raise ValueError("prepare needs data.tokenizer, or prepare.tokenizer_vocab_size to train one")
        if self.sources and not self.tokenizer:
            raise ValueError("sources need data.tokenizer: the folder of the tokenizer that made them")
        try:
            shares = [float(x) for x in self.split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(map(math.isfinite, shares)) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"split must be three shares like 98,2,0 (got {self.split!r})")
        names = self.source_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"sources lists {twice} twice: list it once, with the weights added up, or give it two names"
            )
        if self.selection and len(self.sources) < 2:
            raise ValueError(f"selection needs two or more sources to choose from ({len(self.sources)} given)")
        if self.selection and self.num_workers:
            raise ValueError(
                f"selection needs num_workers 0 ({self.num_workers} given): workers read ahead of the weights' changes"
            )
        return self


class Offload(Frozen):
    """Move activations to host memory while they wait for their backward pass; off where the group is left out.

    Attributes:
        share: of each stage's activations: one share for all stages, a list of one a stage, or `auto`: the least that fits
            the device, and on a CPU all but one micro-batch's (Baichuan 3: 1 - 1/(pp - stage)).
        min_tensor_bytes: smaller tensors stay.
    """

    share: Literal["auto"] | float | list[float] = "auto"
    min_tensor_bytes: int = Field(default=1 << 16, ge=0)

    @field_validator("share", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        numbers = value if isinstance(value, list) else [value]
        if value != "auto" and not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise ValueError(f"share must be auto, a share from 0 to 1, or a list of one a stage (got {value!r})")
        return value

    @model_validator(mode="after")
    def _check(self) -> Offload:
        shares = [] if self.share == "auto" else self.share if isinstance(self.share, list) else [self.share]
        for share in shares:
            if not 0 <= share <= 1:
                raise ValueError(f"share ({share}) must be between 0 and 1, or auto")
        return self


class Checkpoint(Frozen):
    """When to save, what to keep.

    Attributes:
        interval: steps between saves; the last step is always saved; 0 saves never.
        keep: newest checkpoints kept.
        keep_every: also keep, for ever, the checkpoints of the multiples of so many steps; 0 keeps none.
        asynchronous: `async` in YAML: training waits for a copy in host memory, not for the disk.
        when_busy: a save that is due while one is under way waits for it, or is skipped.
        on_error: a save that fails stops the run, or is reported and the run goes on.
        sha256: also record each file's sha256, which slows the writing down.
        load: start from the weights of this checkpoint (another run's, or an imported one), with a fresh optimizer.
        load_strict: false takes what fits from `load` and leaves the rest at its initial values.
        init_from_hf: start from a Hugging Face folder, read without a conversion. `model` may then be left out: it is
            read from the folder's config.json, as it is from the checkpoint that `load` names.
        export_hf: write RUN_DIR/hf, a Hugging Face folder, when the last step is done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    interval: int = Field(default=100, ge=0)
    keep: int = Field(default=3, gt=0)
    keep_every: int = Field(default=0, ge=0)
    asynchronous: bool = Field(default=True, alias="async")
    when_busy: Literal["wait", "skip"] = "wait"
    on_error: Literal["stop", "continue"] = "stop"
    sha256: bool = False
    load: str | None = None
    load_strict: bool = True
    init_from_hf: str | None = None
    export_hf: bool = False

    @model_validator(mode="after")
    def _check(self) -> Checkpoint:
        if self.load and self.init_from_hf:
            raise ValueError(f"give load ({self.load}) or init_from_hf ({self.init_from_hf}), not both")
        if self.export_hf and not self.interval:
            raise ValueError("export_hf needs a saved checkpoint: interval must not be 0")
        return self


class Resilience(Frozen):
    """How a run that hangs or is told to stop comes to its end.

    Attributes:
        first_step_timeout_s: a rank that shows no progress for so long, before its first step is done, ends the job, with
            every rank's last step, phase and Python stack written to RUN_DIR/hang; 0 waits for ever.
        step_timeout_s: the same for later steps, evaluations and saves.
        grace_s: after SIGTERM or SIGINT, the step at hand and the save have so long; then the process ends.
    """

    first_step_timeout_s: float = Field(default=1800.0, ge=0)
    step_timeout_s: float = Field(default=600.0, ge=0)
    grace_s: float = Field(default=25.0, gt=0)


class Kernels(Frozen):
    """Which implementation computes each operator: auto is Triton where it runs, and torch elsewhere.

    Attributes:
        linear_cross_entropy: `fused` computes the output layer and the loss in one operator, which holds the logits of a
            chunk of tokens at a time; `off` computes all logits first. auto is fused where Triton runs.
    """

    attention: KernelChoice = "auto"
    rope: KernelChoice = "auto"
    rms_norm: KernelChoice = "auto"
    swiglu: KernelChoice = "auto"
    cross_entropy: KernelChoice = "auto"
    linear_cross_entropy: Literal["auto", "fused", "off"] = "auto"
