"""The configuration groups of experiment trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flagscale_like.arch import Frozen


class Wandb(Frozen):
    """Weights & Biases, through its own client (`pip install 'flagscale_like[wandb]'`).

    Attributes:
        project: the project that the run belongs to.
        entity: the user or team that the project belongs to; without it, the one that is logged in.
        name: name of the run; without it, the last part of `run_dir`.
        group: group of runs, for example of one sweep.
        tags: words by which runs are found.
        mode: `offline` writes to RUN_DIR/wandb only; `wandb sync` sends it later.
    """

    project: str = Field(min_length=1)
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline"] = "online"


class Mlflow(Frozen):
    """MLflow, through its own client (`pip install 'flagscale_like[mlflow]'`).

    Attributes:
        experiment: the experiment that the run belongs to; it is made if it is not there.
        tracking_uri: address of the tracking server, or of a store; without it, the client's own (MLFLOW_TRACKING_URI).
        name: name of the run; without it, the last part of `run_dir`.
    """

    experiment: str = Field(min_length=1)
    tracking_uri: str | None = None
    name: str | None = None


class Logging(Frozen):
    """Trackers that get every number of metrics.jsonl. A resumed run goes on in the tracker's run.

    Attributes:
        wandb: log to Weights & Biases.
        mlflow: log to MLflow.
    """

    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
