"""The configuration groups of monitors, initialisation and dynamic data selection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen

# What happens when a monitor finds an anomaly: `log` logs it; `skip` also skips the optimizer step, `rewind` returns to an
# earlier checkpoint, `stop` stops the run.
Action = Literal["log", "skip", "rewind", "stop"]


class Spike(Frozen):
    """Detects spikes: a value above the mean + `sigma` standard deviations of the last `window` steps, or above `limit`.

    Attributes:
        sigma: standard deviations above the mean from which a value is a spike.
        window: steps over which mean and standard deviation are computed. Until a quarter of them is recorded, only `limit`
            is checked.
        limit: a value above this limit is a spike, from the first step on.
        action: what happens at a spike: log it, skip the step, rewind, or stop the run.
    """

    sigma: float = Field(default=6.0, gt=0)
    window: int = Field(default=128, ge=8)
    limit: float | None = Field(default=None, gt=0)
    action: Action = "log"


class LayerNorms(Frozen):
    """Measures each layer's gradient norm and update-to-weight ratio.

    Attributes:
        interval: steps between measurements.
        update_limit: an update-to-weight ratio above this limit is recorded as an event.
    """

    interval: int = Field(default=100, gt=0)
    update_limit: float | None = Field(default=None, gt=0)


class EffectiveRank(Frozen):
    """Measures the effective rank of matrices (Roy and Vetterli 2007): the number of directions that they use.

    Attributes:
        interval: steps between measurements.
        of: what is measured: `weights` are the weight matrices of a layer's attention and dense FFN, `gradients` the
            gradients of these matrices, `activations` the residual stream after a layer. Experts' matrices are left out.
        layers: number of layers to measure, evenly spaced, with the first and the last layer.
        exact_up_to: the rank is exact for matrices whose smaller side is at most this, and estimated by sketching for larger
            ones.
        tokens: tokens of the residual stream that each data-parallel rank measures.
        drop: an effective rank below this share of the highest one that the matrix had is an event.
        after: steps at the start of training in which `drop` is not checked, because the ranks of the residual stream and of
            gradients fall far below those of a random model.
        least: an effective rank below this number is an event, from the first step on. Below 2, nearly all of the matrix is
            in one direction.
        action: what happens at such an event: log it, skip the step, rewind, or stop the run.
    """

    interval: int = Field(default=100, gt=0)
    of: list[Literal["weights", "gradients", "activations"]] = Field(
        default=["weights", "gradients", "activations"], min_length=1
    )
    layers: int = Field(default=4, gt=0)
    exact_up_to: int = Field(default=256, gt=0)
    tokens: int = Field(default=256, gt=0)
    drop: float = Field(default=0.5, gt=0, lt=1)
    after: int = Field(default=0, ge=0)
    least: float | None = Field(default=None, ge=1)
    action: Action = "log"


class ExpertLoads(Frozen):
    """Measures how a mixture of experts spreads its tokens.

    Attributes:
        interval: steps between measurements, each over the steps since the one before.
        dead: an expert that gets less than this share of an even load is an event.
    """

    interval: int = Field(default=10, gt=0)
    dead: float = Field(default=0.01, ge=0, lt=1)


class Monitors(Frozen):
    """The quantities that are monitored during training, and the reaction to an anomaly.

    Attributes:
        non_finite: what happens if the loss or the gradient norm is NaN or Inf: `skip` skips the optimizer step, `rewind`
            returns to an earlier checkpoint, `stop` stops the run.
        loss: spikes of the loss.
        grad_norm: spikes of the global gradient norm.
        layers: gradient norm and update-to-weight ratio of each layer.
        effective_rank: effective rank of weights, gradients and activations.
        experts: load of the experts, in a model that has experts.
        max_consecutive_skips: number of consecutive skipped steps that is tolerated; one more triggers `on_max_skips`.
        on_max_skips: what happens after too many consecutive skipped steps.
        rewind_steps: a rewind loads the newest checkpoint that is at least this many steps old. Training continues from it
            with the samples that follow the last step; the samples read in between are not read again (Chowdhery et al.
            2022, PaLM).
        max_rewinds: number of rewinds that is tolerated; one more stops the run.
    """

    non_finite: Literal["skip", "rewind", "stop"] = "skip"
    loss: Spike | None = Spike()
    grad_norm: Spike | None = Spike()
    layers: LayerNorms | None = None
    effective_rank: EffectiveRank | None = None
    experts: ExpertLoads | None = ExpertLoads()
    max_consecutive_skips: int = Field(default=10, ge=0)
    on_max_skips: Literal["rewind", "stop"] = "stop"
    rewind_steps: int = Field(default=100, gt=0)
    max_rewinds: int = Field(default=3, gt=0)

    @property
    def may_rewind(self) -> bool:
        """Whether any monitor can trigger a rewind."""
        watched = (self.loss, self.grad_norm, self.effective_rank)
        return "rewind" in (self.non_finite, self.on_max_skips, *(m.action for m in watched if m is not None))


class MuP(Frozen):
    """Width scaling by muP (Yang et al. 2022): values that were tuned at `base_hidden_size` also suit the width of the model.

    Attributes:
        base_hidden_size: hidden size at which the learning rate and init_std were tuned. A wider model is assumed to have
            more attention heads of the same size, and a proportionally larger FFN.
    """

    base_hidden_size: int = Field(gt=0)


class Salience(Frozen):
    """Salience-consistent initialisation: a calibration before the first step. `training.salience` defines it.

    Attributes:
        samples: training samples that each iteration reads, rounded up to whole micro-batches on all ranks.
        rounds: iterations with a growing number of layers: iteration r calibrates the first r / rounds of the layers, and the
            branches of deeper layers are scaled to 0.
        settle: further iterations, with all layers.
        max_scale: largest factor by which a branch is scaled up or down.
    """

    samples: int = Field(default=32, gt=0)
    rounds: int = Field(default=4, gt=0)
    settle: int = Field(default=4, gt=0)
    max_scale: float = Field(default=8.0, gt=1)


class Init(Frozen):
    """Initialisation of the weights. The standard deviations are in the group `model`: init_std, output_init_std, norm_init.

    Attributes:
        scheme: standard deviation of the matrices that write to the residual stream: init_std / sqrt(2 * num_layers) with
            `depth_scaled` (Radford et al. 2019), init_std with `standard`. model.output_init_std overrides both.
        mup: width scaling by muP.
        salience: calibration before the first step.
    """

    scheme: Literal["depth_scaled", "standard"] = "depth_scaled"
    mup: MuP | None = None
    salience: Salience | None = None


class Selection(Frozen):
    """Dynamic data selection: adapts the weights of the sources during training. It starts from the weights in data.sources.

    Attributes:
        rule: how a source is scored. `progress`: by the decrease of its loss, divided by its weight. `loss`: by its loss
            (Online Data Mixing, Albalak et al. 2023). `target`: by the alignment of its gradient with the gradient on
            `target`.
        target: path of the .bin/.idx pair of a small held-out set, without the suffix. Required with the rule `target`.
        interval: steps between changes of the weights.
        floor: smallest weight of a source, as a share of 1 / number of sources.
        rate: step size of the exponentiated gradient that updates the weights.
        memory: share of the previous value in the moving averages of losses and scores.
        probe_samples: samples of each source, and of the target, whose gradients the rule `target` computes at each change;
            rounded up to whole micro-batches on all ranks.
    """

    rule: Literal["progress", "loss", "target"] = "progress"
    target: str | None = None
    interval: int = Field(default=10, gt=0)
    floor: float = Field(default=0.1, gt=0, le=1)
    rate: float = Field(default=0.5, gt=0)
    memory: float = Field(default=0.7, ge=0, lt=1)
    probe_samples: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Selection:
        if (self.rule == "target") != (self.target is not None):
            raise ValueError(
                f"selection.target belongs to selection.rule target (rule {self.rule}, target {self.target})"
            )
        return self
