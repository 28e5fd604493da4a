"""The groups of keys in a run's configuration. Each class docstring gives the meaning of its keys (see docs/hooks.py)."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from flagscale_like.arch import Frozen
from flagscale_like.config.health import Selection
from flagscale_like.errors import required

KernelChoice = Literal["auto", "triton", "torch"]
ContextParallelKind = Literal["gather", "a2a"]


def expand_path(text: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` replaced, as a shell does.

    Raises:
        ValueError: it is empty, or a variable is not set, whose name would become a folder's.
    """
    if not text:
        raise ValueError("is empty: write a path; for the folder of the command itself, a dot")
    expanded = os.path.expandvars(os.path.expanduser(text))
    if unset := re.search(r"\$\{?[A-Za-z_]\w*\}?", expanded):
        raise ValueError(
            f"{text!r} names {unset[0]}, which is not set in the environment: set it, or write the path out"
        )
    if expanded.startswith("~"):
        raise ValueError(f"{text!r}: there is no such user's home folder: write the path out")
    return expanded


PathText = Annotated[str, AfterValidator(expand_path)]


def parts_of_row(cp: int, kind: ContextParallelKind) -> int:
    """Equal parts that a row is cut into for context parallelism: see runtime.row_cut."""
    return 2 * cp if cp > 1 and kind == "gather" else cp


class Parallel(Frozen):
    """Degrees of parallelism. The data-parallel degree is the world size divided by tp * pp * cp.

    Attributes:
        tp: tensor-parallel ranks (Shoeybi et al. 2019).
        pp: pipeline stages.
        vpp: model chunks on each stage in the interleaved schedule (Narayanan et al. 2021); 1 uses the 1F1B schedule.
        sp: sequence parallelism over the tensor-parallel group (Korthikanti et al. 2022); needs tp above 1.
        cp: context-parallel ranks. Each holds a part of every sequence, and attention brings the parts together.
        cp_kind: how it does. `gather` gathers keys and values on every rank (Dubey et al. 2024). `a2a` exchanges tokens for
            heads before and after attention (DeepSpeed Ulysses: Jacobs et al. 2023); it needs num_query_groups / tp
            divisible by cp.
        ep: expert-parallel ranks: each holds a part of every layer's experts, and tokens travel to the experts that they go
            to. These ranks are taken from those of tp, cp and data parallelism, so that ep divides world size / pp. Experts
            are not cut over tp.
        first_stage_layers: layers of the first pipeline stage; without it, as many as the other stages.
        last_stage_layers: layers of the last pipeline stage; without it, as many as the other stages.
    """

    tp: int = Field(default=1, gt=0)
    pp: int = Field(default=1, gt=0)
    vpp: int = Field(default=1, gt=0)
    sp: bool = False
    cp: int = Field(default=1, gt=0)
    cp_kind: ContextParallelKind = "gather"
    ep: int = Field(default=1, gt=0)
    first_stage_layers: int | None = Field(default=None, gt=0)
    last_stage_layers: int | None = Field(default=None, gt=0)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model, but for experts."""
        return self.tp * self.pp * self.cp

    @property
    def smallest_world(self) -> int:
        """The fewest ranks that have this layout; any multiple of them has, too."""
        return self.pp * math.lcm(self.tp * self.cp, self.ep)

    @property
    def divisor(self) -> str:
        """smallest_world in words."""
        if self.ep == 1:
            return f"tp*pp*cp ({self.tp}*{self.pp}*{self.cp})"
        return f"pp times the least common multiple of tp*cp and ep ({self.pp}, {self.tp}*{self.cp}, {self.ep})"

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
    """Batch-size ramp-up: the global batch size grows in equal increments until it reaches train.global_batch_size.

    Attributes:
        start: global batch size of the first step.
        increment: sequences that each increase adds. It divides global_batch_size - start.
        samples: samples over which the ramp-up is spread. Each batch size gets an equal number of them.
    """

    start: int = Field(gt=0)
    increment: int = Field(gt=0)
    samples: int = Field(gt=0)


class Profile(Frozen):
    """Record a torch profiler trace of some steps, one file for each rank, in RUN_DIR/profile.

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
    """The training loop. Batch sizes are in sequences.

    Attributes:
        steps: optimizer steps of the whole run. The learning-rate schedule and the order of the data are planned for them.
        micro_batch_size: sequences of one forward pass on one data-parallel rank.
        global_batch_size: sequences of one step over all ranks.
        seq_length: tokens of a sequence.
        seed: seed of the initial weights and of the order of the data.
        precision: data type of weights and activations in the model. The optimizer keeps fp32 weights.
        recompute: activations that are recomputed in the backward pass: `selective` recomputes the attention core, `full`
            every layer.
        ramp_up: batch-size ramp-up.
        profile: torch profiler trace of some steps.
        exit_at_step: save and stop after this step. The schedules stay planned for `steps`, so that the run can resume.
        log_interval: steps between log lines.
        eval_interval: steps between evaluations on the validation data; 0 turns evaluation off.
        eval_steps: global batches that one evaluation reads. One of task rl answers all of data.eval_prompts.
        frozen: shell patterns of parameter names, such as `embedding.*` or `decoder.layers.0.*`. Training does not change
            these parameters.
        gc_interval: steps between runs of Python's garbage collector, at the same step on every rank; 0 leaves garbage
            collection to Python.
    """

    steps: int = Field(gt=0, le=10**12)
    micro_batch_size: int = Field(gt=0)
    global_batch_size: int = Field(gt=0, le=10**6)
    seq_length: int = Field(gt=0)
    seed: int = Field(default=1234, ge=0, lt=2**31)
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
        """Global batch size of the step that begins after `consumed` samples."""
        ramp = self.ramp_up
        if ramp is None or consumed >= ramp.samples:
            return self.global_batch_size
        increments = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (consumed * increments // ramp.samples)

    def total_samples(self) -> int:
        """Samples that all `steps` steps consume together."""
        return self.consumed_after(0, self.steps)

    def consumed_after(self, consumed: int, steps: int) -> int:
        """Samples consumed `steps` steps after the step at which `consumed` were.

        The ramp-up is walked by its batch sizes, not by its steps.
        """
        ramp = self.ramp_up
        while ramp is not None and steps > 0 and consumed < ramp.samples:
            size = self.batch_size_at(consumed)
            increments = (self.global_batch_size - ramp.start) // ramp.increment
            grown = consumed * increments // ramp.samples + 1  # increases made when the size changes next
            until = -(-grown * ramp.samples // increments) if increments > 0 else ramp.samples
            taken = min(steps, max(1, -(-(until - consumed) // size)))
            consumed, steps = consumed + taken * size, steps - taken
        return consumed + steps * self.global_batch_size


class Optimizer(Frozen):
    """AdamW with ZeRO-1 sharding (megatron-core's distributed optimizer), and the learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end of the decay.
        schedule: how the learning rate falls from `lr` after the warm-up: `cosine` and `linear` decay to `min_lr` over the
            remaining steps, `wsd` stays at `lr` and decays linearly over the last `decay_steps` steps, `constant` stays at
            `lr`.
        warmup_steps: steps of the linear warm-up from 0 to `lr`.
        decay_steps: steps of the decay at the end of the schedule `wsd`, which needs it.
        weight_decay: AdamW's decoupled weight decay.
        beta1: AdamW's decay rate of the first moment.
        beta2: AdamW's decay rate of the second moment.
        eps: AdamW's epsilon, added to the denominator.
        clip_grad: maximum global gradient norm; larger gradients are scaled down to it. 0 turns clipping off.
        initial_loss_scale: first value of the dynamic loss scale; used with fp16 only.
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
    """One data source: a pair of .bin/.idx files and its weight in the blend.

    Attributes:
        path: path of the .bin/.idx pair without the suffix.
        weight: share of the samples that come from this source, relative to the weights of the other sources.
        name: name of the source in logs and reports; without it, the last part of `path`.
    """

    path: PathText
    weight: float = Field(default=1.0, gt=0)
    name: str | None = None

    @field_validator("path")
    @classmethod
    def _check(cls, path: str) -> str:
        prefix = path.removesuffix(".bin").removesuffix(".idx")
        if prefix != path:
            raise ValueError(f"a source is a .bin and an .idx file, named without the suffix: {prefix}")
        return path


class Chat(Frozen):
    """How JSON records become conversations or pairs, as the commands `data chat` and `data pairs` make them.

    Attributes:
        template: file of the chat template (Jinja); without it, the template of data.tokenizer.
        train: the assistant's messages that count: `all`, or only the `last` of each conversation.
        long: what happens to a conversation that does not fit train.seq_length: `refuse` ends with an error, `drop` leaves it
            out, `cut` keeps its beginning.
        skip_empty: leave out conversations without a token that counts; without it, such a conversation is an error.
    """

    template: str | None = None
    train: Literal["all", "last"] = "all"
    long: Literal["refuse", "drop", "cut"] = "refuse"
    skip_empty: bool = False


class Prepare(Frozen):
    """Tokenize raw text before the first step. The first run writes the .bin/.idx to RUN_DIR/data; later runs reuse them.

    Attributes:
        input: files, folders or globs; `python-stdlib` is the source of the running Python's standard library.
        tokenizer_vocab_size: train a byte-level BPE with this vocabulary size on the input, if data.tokenizer is not given.
        chat: the input is conversations, as JSON lines or arrays, or pairs of answers if the objective reads pairs;
            without it, text.
    """

    input: list[PathText] = Field(min_length=1)
    tokenizer_vocab_size: int | None = Field(default=None, ge=257)
    chat: Chat | None = None


class Data(Frozen):
    """The training data. Exactly one of `sources`, `prepare`, `synthetic` and `prompts` must be given.

    Attributes:
        sources: tokenized data sources, which are blended by their weights.
        prepare: raw text to tokenize before the first step.
        synthetic: train on random tokens, in rows of what the objective reads, for benchmarks. `conversations` gives packs of
            conversations in the place of text.
        prompts: files of prompts, for reinforcement learning; see docs/rl.md.
        eval_prompts: files of held-out prompts, which the policy answers every train.eval_interval iterations.
        tokenizer: the Hugging Face tokenizer folder that the sources were tokenized with. Required with `sources` and
            `prompts`.
        split: shares of the documents for training, validation and test. If evaluation is on and the test share is above 0,
            the test loss is reported once, after the last step.
        num_workers: data loader processes of each rank; 0 loads data in the training process.
        cache_dir: folder of the sample index; without it, a folder in the run folder.
        selection: dynamic data selection, which adapts the weights of the sources during training.
        accept_changes: resume although the sources or `split` have changed so that documents move between training and
            validation.
    """

    sources: list[Source] = Field(default_factory=list)
    prepare: Prepare | None = None
    synthetic: bool | Literal["conversations"] = False
    prompts: list[PathText] = Field(default_factory=list)
    eval_prompts: list[PathText] = Field(default_factory=list)
    tokenizer: PathText | None = None
    split: str = "98,2,0"
    num_workers: int = Field(default=0, ge=0)
    cache_dir: PathText | None = None
    selection: Selection | None = None
    accept_changes: bool = False

    @property
    def required_tokenizer(self) -> str:
        """The tokenizer's folder, of a run that reads text."""
        return required(self.tokenizer, "data.tokenizer")

    @property
    def required_prepare(self) -> Prepare:
        """The group prepare, of a run that prepares its data."""
        return required(self.prepare, "data.prepare")

    @property
    def tests(self) -> bool:
        """Whether `split` has a test share."""
        return float(self.split.split(",")[2]) > 0

    @property
    def source_names(self) -> list[str]:
        """The name of each source in logs and reports; the whole path if two sources would have the same name."""
        names = [source.name or source.path.rstrip("/").rpartition("/")[2] for source in self.sources]
        return [s.path if names.count(n) > 1 else n for n, s in zip(names, self.sources, strict=True)]

    @model_validator(mode="after")
    def _check(self) -> Data:
        given = sum((bool(self.sources), self.prepare is not None, bool(self.synthetic), bool(self.prompts)))
        if given != 1:
            raise ValueError(f"give exactly one of sources, prepare, synthetic and prompts ({given} given)")
        if self.prepare and not (self.tokenizer or self.prepare.tokenizer_vocab_size):
            raise ValueError("prepare needs data.tokenizer, or prepare.tokenizer_vocab_size to train one")
        if self.prepare and self.prepare.chat and not (self.tokenizer or self.prepare.chat.template):
            raise ValueError(
                "prepare.chat needs prepare.chat.template where a tokenizer is trained: the chat template's file"
            )
        if self.prompts and not self.tokenizer:
            raise ValueError("prompts need data.tokenizer: the folder of the policy's tokenizer")
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
                f"sources lists {twice} twice: list it once with the sum of the weights, or give the two entries names"
            )
        if self.selection and len(self.sources) < 2:
            raise ValueError(f"selection needs two or more sources to choose from ({len(self.sources)} given)")
        if self.selection and self.num_workers:
            raise ValueError(
                f"selection needs num_workers 0 ({self.num_workers} given): loader processes would read ahead of a change of "
                "the weights"
            )
        return self


class Offload(Frozen):
    """Move activations to host memory between their forward and their backward pass.

    Attributes:
        share: share of a pipeline stage's activations to move, from 0 to 1: one number for all stages, or a list with one
            number for each stage. `auto` takes the smallest share with which the run fits the device; on a CPU, it takes the
            activations of all micro-batches but one (Baichuan 3: 1 - 1/(pp - stage)).
        min_tensor_bytes: tensors that are smaller stay on the device.
    """

    share: Literal["auto"] | float | list[float] = "auto"
    min_tensor_bytes: int = Field(default=1 << 16, ge=0)

    @field_validator("share", mode="before")
    @classmethod
    def _share(cls, value: object) -> object:
        numbers = value if isinstance(value, list) else [value]
        if value != "auto" and not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
            raise ValueError(
                f"share must be auto, a number from 0 to 1, or a list of one number for each stage (got {value!r})"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Offload:
        shares = [] if self.share == "auto" else self.share if isinstance(self.share, list) else [self.share]
        for share in shares:
            if not 0 <= share <= 1:
                raise ValueError(f"share ({share}) must be between 0 and 1, or auto")
        return self


class Checkpoint(Frozen):
    """Which checkpoints are saved and kept, and the weights that training starts from.

    Attributes:
        interval: steps between saves. The last step is saved, too. 0 saves no checkpoint.
        keep: number of newest checkpoints to keep; older ones are removed.
        keep_every: never remove the checkpoint of a step that is a multiple of this number; 0 turns this off.
        asynchronous: written `async` in YAML. Training continues as soon as the state is copied to host memory; a background
            thread writes the copy to disk.
        when_busy: what happens to a save that is due before the previous one is written: `wait` waits for the previous save,
            `skip` leaves the new one out.
        on_error: what happens if a save fails: `stop` stops the run, `continue` logs the failure.
        sha256: also record the sha256 of each file, which makes saves slower.
        load: start from the weights of this checkpoint, from another run or imported, with a new optimizer state.
        load_strict: `false` loads the tensors of `load` that fit the model and leaves the other parameters at their initial
            values.
        init_from_hf: start from the weights in this Hugging Face folder. With `init_from_hf` or `load`, the group `model`
            may be omitted: it is read from the folder's config.json or from the checkpoint.
        export_hf: write the model as a Hugging Face folder to RUN_DIR/hf after the last step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    interval: int = Field(default=100, ge=0)
    keep: int = Field(default=3, gt=0)
    keep_every: int = Field(default=0, ge=0)
    asynchronous: bool = Field(default=True, alias="async")
    when_busy: Literal["wait", "skip"] = "wait"
    on_error: Literal["stop", "continue"] = "stop"
    sha256: bool = False
    load: PathText | None = None
    load_strict: bool = True
    init_from_hf: PathText | None = None
    export_hf: bool = False

    @model_validator(mode="after")
    def _check(self) -> Checkpoint:
        if self.load and self.init_from_hf:
            raise ValueError(f"give load ({self.load}) or init_from_hf ({self.init_from_hf}), not both")
        if self.export_hf and not self.interval:
            raise ValueError("export_hf needs a saved checkpoint: interval must not be 0")
        return self


class Resilience(Frozen):
    """How a run ends that hangs or receives a signal.

    Attributes:
        first_step_timeout_s: seconds that a rank may make no progress before its first step is done, and while training waits
            for a save, a rewind or an export. After that time the job ends, and the last step, phase and Python stack of
            every rank are in RUN_DIR/hang. 0 turns the timeout off.
        step_timeout_s: the same limit for later steps and evaluations, in seconds.
        grace_s: seconds that the current step and the save may take after SIGTERM or SIGINT. Then the process ends.
    """

    first_step_timeout_s: float = Field(default=1800.0, ge=0)
    step_timeout_s: float = Field(default=600.0, ge=0)
    grace_s: float = Field(default=25.0, gt=0)


class Kernels(Frozen):
    """The implementation of each operator. `auto` is the Triton kernel on devices that Triton supports, and torch elsewhere.

    Attributes:
        attention: core attention, without the projections.
        rope: rotary position embedding.
        rms_norm: RMSNorm.
        swiglu: the SwiGLU activation of the FFN, and with experts the permutation of their tokens.
        cross_entropy: the cross-entropy loss over the vocabulary.
        linear_cross_entropy: `fused` computes the output layer and the loss in one operator, which holds the logits of one
            chunk of tokens at a time. `off` computes all logits first. `auto` is `fused` on devices that Triton supports.
    """

    attention: KernelChoice = "auto"
    rope: KernelChoice = "auto"
    rms_norm: KernelChoice = "auto"
    swiglu: KernelChoice = "auto"
    cross_entropy: KernelChoice = "auto"
    linear_cross_entropy: Literal["auto", "fused", "off"] = "auto"
