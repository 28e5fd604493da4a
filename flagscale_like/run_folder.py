"""RunFolder: where a run keeps what. Every name in a run's folder is written here and nowhere else."""

from __future__ import annotations

from pathlib import Path


class RunFolder:
    """The folder of one run; `run_dir` of its configuration.

    Attributes:
        config: the resolved configuration, YAML.
        metrics, events: one JSON record a line: what is reported, and what monitors found.
        resilience: starts and stops, one JSON record a line; see training.recovery.
        tensorboard: folder of TensorBoard's files.
        trackers: what experiment trackers call the run; see training.trackers.
        loss_plot: the loss curves.
        report: the run as one HTML page.
        checkpoints: a folder a saved step; see checkpoint.format.
        hf: the model of the last step as a Hugging Face folder.
        data: what `data.prepare` made of raw text: text.bin, text.idx, tokenizer/.
        index: the sample index of the data sources.
        samples, draws, sample_losses: which data each step read; see data.provenance and data.draws.
        reference: log-probabilities of the reference model of DPO; see training.reference.
        outside: rollouts outside of what the reward model was validated on; see rl.guard.
        vllm: what vLLM builds the policy from, without weights; see rl.generators.
        rounds: a folder for each round of reinforcement learning; see rl.rounds.
        profile: a torch profiler trace a rank.
        hang: the ranks' stacks, written when one makes no progress.
        lock: whose run it is while it trains; see run_lock.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.events = self.root / "events.jsonl"
        self.resilience = self.root / "resilience.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.trackers = self.root / "trackers.json"
        self.loss_plot = self.root / "loss.png"
        self.report = self.root / "report.html"
        self.checkpoints = self.root / "checkpoints"
        self.hf = self.root / "hf"
        self.data = self.root / "data"
        self.index = self.data / "index"
        self.samples = self.root / "samples.jsonl"
        self.draws = self.root / "draws.jsonl"
        self.sample_losses = self.root / "sample_losses"
        self.reference = self.root / "reference.safetensors"
        self.outside = self.root / "outside.jsonl"
        self.vllm = self.root / "vllm"
        self.rounds = self.root / "rounds"
        self.profile = self.root / "profile"
        self.hang = self.root / "hang"
        self.lock = self.root / "lock"
