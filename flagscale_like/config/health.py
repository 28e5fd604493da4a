"""The groups that keep a run in good health: monitors, initialisation, dynamic data selection."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen

# What a monitor that finds something asks for: a line in the log alone, or also to drop the step, go back, or end.
Action = Literal["log", "skip", "rewind", "stop"]


class Spike(Frozen):
    """A value that leaps: above mean + `sigma` standard deviations of the last `window` steps, or above `limit`.

    Attributes:
        window: steps remembered; nothing is judged by them before a quarter of them is there.
        limit: an absolute ceiling, from the first step on.
        action: what is done with such a step.
    """

    sigma: float = Field(default=6.0, gt=0)
    window: int = Field(default=128, ge=8)
    limit: float | None = Field(default=None, gt=0)
    action: Action = "log"


class LayerNorms(Frozen):
    """Each layer's gradient norm and update-to-weight ratio, every `interval` steps.

    Attributes:
        update_limit: a ratio above it is an event.
    """

    interval: int = Field(default=100, gt=0)
    update_limit: float | None = Field(default=None, gt=0)


class EffectiveRank(Frozen):
    """How many directions matrices use (Roy and Vetterli 2007), every `interval` steps.

    Attributes:
        of: what is measured: the layers' four weight matrices, their gradients, the residual stream behind each layer.
        layers: so many layers are watched, evenly spaced, the first and the last among them.
        exact_up_to: matrices whose smaller side is larger are sketched.
        tokens: of the residual stream, so many tokens a data-parallel rank.
        drop: an effective rank below this share of the highest that the matrix had is an event.
        after: steps whose ranks are not judged by `drop`: those of the residual stream and of gradients fall far from a
            random model's while training begins.
        least: an effective rank below it is an event, from the first step on. Below 2, one direction stands for nearly all.
        action: what is done with the step that shows it.
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


class Monitors(Frozen):
    """What to watch, and what to do when training goes wrong.

    Attributes:
        non_finite: a loss or gradient norm that is NaN or Inf is skipped before the optimizer step, makes the run go back,
            or stops it.
        loss, grad_norm: spikes; null watches none.
        layers, effective_rank: off where they are left out.
        max_consecutive_skips: more skipped steps than this in a row do what `on_max_skips` says.
        rewind_steps: to go back is to load the newest checkpoint that is at least so many steps old, and to go on from
            it with the data that follows: what was read in between is skipped (Chowdhery et al. 2022, PaLM).
        max_rewinds: going back once more than this stops the run.
    """

    non_finite: Literal["skip", "rewind", "stop"] = "skip"
    loss: Spike | None = Spike()
    grad_norm: Spike | None = Spike()
    layers: LayerNorms | None = None
    effective_rank: EffectiveRank | None = None
    max_consecutive_skips: int = Field(default=10, ge=0)
    on_max_skips: Literal["rewind", "stop"] = "stop"
    rewind_steps: int = Field(default=100, gt=0)
    max_rewinds: int = Field(default=3, gt=0)

    @property
    def may_rewind(self) -> bool:
        watched = (self.loss, self.grad_norm, self.effective_rank)
        return "rewind" in (self.non_finite, self.on_max_skips, *(m.action for m in watched if m is not None))


class MuP(Frozen):
    """Width scaling by muP (Yang et al. 2022): what was tuned at `base_hidden_size` holds at the model's.

    Attributes:
        base_hidden_size: the width at which learning rate and init_std were chosen. Heads keep their size, so that wider
            models have more of them, and the FFN grows with the width.
    """

    base_hidden_size: int = Field(gt=0)


class Salience(Frozen):
    """Salience-consistent initialisation, by a calibration before step 0; see `training.salience` for the definition.

    Attributes:
        samples: of the training data, read for each estimate; rounded up to whole micro-batches of all ranks.
        rounds: estimates; in round r the first r / rounds of the layers take part, the deeper ones are still silent.
        settle: estimates after that, with all layers.
        max_scale: a branch is scaled up or down by no more than this.
    """

    samples: int = Field(default=32, gt=0)
    rounds: int = Field(default=4, gt=0)
    settle: int = Field(default=4, gt=0)
    max_scale: float = Field(default=8.0, gt=1)


class Init(Frozen):
    """How the weights begin. Standard deviations and the norms' value are the model's: init_std, output_init_std, norm_init.

    Attributes:
        scheme: `depth_scaled` draws the matrices that write to the residual stream with init_std / sqrt(2 * num_layers)
            (Radford et al. 2019), `standard` with init_std like all others. model.output_init_std overrides both.
        mup: width scaling; off where it is left out.
        salience: calibration; off where it is left out.
    """

    scheme: Literal["depth_scaled", "standard"] = "depth_scaled"
    mup: MuP | None = None
    salience: Salience | None = None


class Selection(Frozen):
    """Weights of the sources that follow the model; `data.sources` gives the weights to begin with.

    Attributes:
        rule: `progress` rewards a source by how fast its loss falls for the samples it got, `loss` by its loss itself (as
            Online Data Mixing does, Albalak et al. 2023), `target` by how well its gradient points along that of `target`.
        target: prefix of the .bin/.idx of a small held-out set; for the rule `target`.
        interval: steps between changes of the weights.
        floor: the smallest weight that a source can have, as a share of an even one.
        rate: how fast the weights follow: of the exponentiated gradient.
        memory: share of the past that an average keeps from one change to the next.
        probe_samples: of the rule `target`: samples read of each source and of the target, each time; rounded up to whole
            micro-batches of all ranks.
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
