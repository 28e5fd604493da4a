"""Rounds of reinforcement learning: the phases of rl.rounds, each made of a recipe that stands by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.manifest import step_folders, step_of
from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import JudgeReward, Reward, RunConfig, load_config
from flagscale_like.config.rewards import Mixture, ModelReward, model_in
from flagscale_like.data.conversations import longest_row
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import ConfigError, DataError, required
from flagscale_like.generation.rollout import GenerationEngine, Prompt, Rollout, Sampling
from flagscale_like.json_files import BAD_VALUES, write_json
from flagscale_like.model.spec import ModelSpec
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.reinforce import reinforce, surroundings
from flagscale_like.recipes.score import score_pairs
from flagscale_like.rl.answers import Answer, RewardSource
from flagscale_like.rl.drawing import drawn
from flagscale_like.rl.generators import build_generator, check_generator, load_weights
from flagscale_like.rl.guard import Candidates, answer_of
from flagscale_like.rl.prompts import Row, Words, read_prompts
from flagscale_like.rl.rewards import build_reward, open_judge
from flagscale_like.rl.rewards.checked import on_main
from flagscale_like.rl.rewards.judge import Comparison, Judge, Verdict, prompt_text
from flagscale_like.rl.rounds import AnswerPair, RoundsRun
from flagscale_like.rl.validation import Validation
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import ParallelContext, agree
from flagscale_like.training.plan import Progress
from flagscale_like.training.weights import weights_to_load

PLACES = "held_out.json"  # of a round's folder: surprise and log-ratio of each held-out answer


def run_rounds(config: RunConfig, ctx: ParallelContext) -> Progress:
    """Make the rounds of a run, from where it stands. All ranks call it.

    Raises:
        ConfigError: the numbers of iterations do not fit each other, or a recipe's configuration is not valid.
        DataError, CheckpointError, DivergedError: see reinforce() and pretrain().
    """
    check_steps(config)
    check_generator(config)
    words = agree(ctx, lambda: Words(config))
    rows = agree(ctx, lambda: read_prompts(config, words))
    phases = RunPhases(config, ctx, words, rows)
    rl = config.required_rl
    model, options = required(model_in(rl.reward), "a reward model"), required(rl.rounds, "rl.rounds")
    rounds = RoundsRun(
        options,
        phases,
        ctx,
        RunFolder(config.run_dir).rounds,
        tokenizer=Path(required(words.folder, "data.tokenizer")),
        reward=model.path,
        seed=config.train.seed,
        say=phases.say,
    )
    done = rounds.run()
    if done:
        phases.say(f"done: {options.count} rounds; everything is in {config.run_dir}")
    return phases.progress


def check_steps(config: RunConfig) -> None:
    """Check the steps of a run with rounds.

    Raises:
        ConfigError: they are not those of the rounds, or the run keeps no checkpoints, from which each phase begins.
    """
    options, train = required(config.required_rl.rounds, "rl.rounds"), config.train
    steps = options.iterations * (1 if options.restart_policy else options.count)
    if train.steps != steps:
        product = "rl.rounds.iterations" + ("" if options.restart_policy else " * count")
        raise ConfigError(f"train.steps ({train.steps}) must be {product} ({steps}): each round makes its iterations")
    if train.exit_at_step is not None:
        raise ConfigError("train.exit_at_step is set by rl.rounds, which stop after each round: leave it out")
    if not config.checkpoint.interval:
        raise ConfigError("rl.rounds go on from checkpoints: checkpoint.interval must be above 0")


class RunPhases:
    """The phases of a run's rounds; see rl.rounds.Phases."""

    def __init__(self, config: RunConfig, ctx: ParallelContext, words: Words, rows: Sequence[Row]) -> None:
        self.config, self.ctx, self.words, self.rows = config, ctx, words, rows
        self.rl, self.folder = config.required_rl, RunFolder(config.run_dir)
        self.options = required(self.rl.rounds, "rl.rounds")
        self.progress = Progress()
        self._drawing: tuple[int, Engine, GenerationEngine, list[Answer]] | None = None
        self._judge: Judge | RewardSource | None = None

    def say(self, line: str) -> None:
        """Tell the user a line, on rank 0."""
        if self.ctx.is_main:
            print(line, flush=True)

    # Sampling

    def policy_config(self, number: int) -> RunConfig:
        """The configuration of the policy's run that round `number` goes on with; of round 0, as it begins."""
        config, options = self.config, self.options
        if not options.restart_policy:
            train = config.train.model_copy(update={"exit_at_step": number * options.iterations} if number else {})
            return config.model_copy(update={"train": train})
        run_dir = str(self.folder.rounds / f"round_{number:04d}" / "policy")
        return config.model_copy(update={"run_dir": run_dir})

    def sample(self, number: int, begin: int, end: int) -> list[AnswerPair]:
        """See Phases. What the guard kept in the last round comes first, each with a fresh answer to its prompt."""
        if self._drawing is None or self._drawing[0] != number:
            self._judge = None
            self._drawing = (number, *self._generator(number), self._kept(number))
        _, engine, generator, kept = self._drawing
        load_weights(generator, engine, number)
        rows = self._rows_of(number, end)
        known = {n: kept[n] for n in range(begin, min(end, len(kept)))}
        prompts = [
            Prompt(known[n].prompt_ids if n in known else rows[n].ids, n, 1 if n in known else 2)
            for n in range(begin, end)
        ]
        drawn = self._draw(generator, prompts, number)
        pairs = []
        for n in range(begin, end):
            if n in known:
                one = known[n]
                row = Row(one.prompt, tuple(one.prompt_ids), one.fields, tuple(one.messages))
                pairs.append((one, self._answer(drawn[n][0], row)))
            else:
                pairs.append((self._answer(drawn[n][0], rows[n]), self._answer(drawn[n][1], rows[n])))
        return pairs

    def _rows_of(self, number: int, count: int) -> list[Row]:
        """The prompts of a round's first pairs: in an order of the round's own, again where they are too few."""
        seed = np.array([self.config.train.seed, 1, number], dtype=np.uint32)
        order = np.random.RandomState(seed).permutation(len(self.rows))
        return [self.rows[order[n % len(order)]] for n in range(count)]

    def _draw(self, generator: GenerationEngine, prompts: Sequence[Prompt], number: int) -> dict[int, list[Rollout]]:
        """The rollouts by prompt, in the order of their samples; the data-parallel ranks share the prompts."""
        drawing = self.rl.rollout
        digest = hashlib.sha256(f"{self.config.train.seed} round {number}".encode()).digest()
        sampling = Sampling(
            max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            top_k=drawing.top_k,
            stop=self.words.stop,
            stop_strings=drawing.stop_strings,
            seed=int.from_bytes(digest[:4], "big"),
        )
        own = prompts[self.ctx.dp_rank :: self.ctx.dp]
        found = {(r.prompt, r.sample): r for r in drawn(generator, own, sampling)}
        every = {key: rollout for part in self.ctx.gather(found) for key, rollout in part.items()}
        return {p.number: [every[p.number, sample] for sample in range(p.samples)] for p in prompts}

    def _answer(self, rollout: Rollout, row: Row) -> Answer:
        return self.words.answer(row, rollout, self.rl.rollout.stop_strings)

    def _generator(self, number: int) -> tuple[Engine, GenerationEngine]:
        """The policy as the last round left it, and what draws with it."""
        source = weights_to_load(self.config, self._newest(number - 1), self.ctx)
        engine = Engine.build(ModelSpec.of(self.config), self.ctx, source=source)
        return engine, build_generator(self.config, engine, self.words)

    def _newest(self, number: int) -> CheckpointReader | None:
        """The newest checkpoint of the policy's run that a round goes on with."""
        config = self.policy_config(number)
        newest = self.ctx.broadcast(next(step_folders(RunFolder(config.run_dir).checkpoints), None))
        return CheckpointReader(newest) if isinstance(newest, Path) else None

    def _kept(self, number: int) -> list[Answer]:
        """Rollouts that the guard kept in the last round; at most as many as pairs are judged."""
        if number == 1:
            return []
        since = 0 if self.options.restart_policy else (number - 2) * self.options.iterations
        path = RunFolder(self.policy_config(number - 1).run_dir).outside
        found = self.ctx.broadcast(
            Candidates(path, required(self.rl.outside, "rl.outside").keep).since(since) if self.ctx.is_main else None
        )
        return [answer_of(record) for record in found[: self.options.pairs]]

    # Judging, and the reward model

    def judge(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """See Phases."""
        options, around = (
            required(self.options.judge, "rl.rounds.judge"),
            surroundings(self.config, self.ctx, self.words),
        )
        if self._judge is None:
            self._drawing = None
            self._judge = (
                open_judge(options, around) if isinstance(options, JudgeReward) else build_reward(options, around)
            )
        return verdicts(self._judge, pairs)

    def renew(self, folder: Path, sources: Sequence[str], start: str | None) -> str | None:
        """See Phases."""
        self._drawing = self._judge = None
        config = reward_config(self.config, folder, sources, start)
        if self.ctx.is_main:
            folder.mkdir(parents=True, exist_ok=True)
        self.ctx.barrier()
        progress = pretrain(config, self.ctx)
        return str(folder) if progress.step >= config.train.steps else None

    def accuracy(self, path: str, sources: Sequence[str]) -> float:
        """See Phases."""
        source = open_adapted(Path(path), adapter=None).source
        parts = 2 * self.ctx.layout.tp * self.ctx.layout.cp  # a row may be cut into
        length = -(-max(map(longest_row, sources)) // parts) * parts
        scored = [score_pairs(source, prefix, self.ctx, seq_length=length) for prefix in sources]
        places = self._places(sources, length)
        found = None
        if self.ctx.is_main:
            values = np.concatenate([one.values for one in scored if one is not None])
            record = Validation.measure(values, f"the held-out pairs of {len(sources)} rounds", **places)
            if Path(path).resolve().is_relative_to(self.folder.rounds.resolve()):
                record.write(Path(source.folder), source)
            found = record.accuracy
        return float(self.ctx.broadcast(found))

    def _places(self, sources: Sequence[str], length: int) -> dict[str, list[float]]:
        """Surprise and log-ratios of the held-out answers, as Validation.measure() takes them; nothing without a reference.

        Those of a round are measured once, as its policy is the one that drew them: they are kept beside its pairs. In the
        first round that is the reference itself, and the ratios, which are 0, bound nothing.
        """
        if not self.rl.kl.coefficient:
            return {}
        for number, prefix in enumerate(sources, 1):
            if self._measured(number) is None:
                self._measure(number, prefix, length)
        found = [own for number in range(1, len(sources) + 1) if (own := self._measured(number))]
        if len(found) < len(sources):
            return {}
        return {
            "surprise": [value for own in found for value in own["surprise"]],
            "kl": [value for own in found[1:] for value in own["kl"]],
        }

    def _measured(self, number: int) -> dict[str, list[float]] | None:
        """What was measured of a round's held-out answers; None where it is not yet.

        Raises:
            DataError: the file is damaged.
        """
        path = self.folder.rounds / f"round_{number:04d}" / PLACES

        def read() -> dict[str, list[float]] | None:
            if not path.is_file():
                return None
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                return {name: [float(value) for value in record[name]] for name in ("surprise", "kl")}
            except BAD_VALUES as error:
                raise DataError(
                    f"{path}: is damaged ({type(error).__name__}: {error}): remove it to measure again"
                ) from None

        return on_main(self.ctx, read)

    def _measure(self, number: int, prefix: str, length: int) -> None:
        """Measure a round's held-out answers under the policy as it is and as the run began."""
        begun = weights_to_load(self.config, None, self.ctx)
        if begun is None:
            self.say(
                "the run began with new weights: rl.outside knows neither surprise nor log-ratios of validated answers"
            )
            return
        reader = self._newest(number - 1)
        train, drawing = self.config.train, self.rl.rollout
        options: dict[str, Any] = {
            "seq_length": length,
            "precision": train.precision,
            "temperature": drawing.temperature,
        }
        reference = score_pairs(begun, prefix, self.ctx, **options)
        policy = (
            score_pairs(
                required(weights_to_load(self.config, reader, self.ctx), "weights"), prefix, self.ctx, **options
            )
            if reader
            else reference
        )
        if reference is not None and policy is not None:
            ratios = (policy.values - reference.values).reshape(-1).tolist()
            path = self.folder.rounds / f"round_{number:04d}" / PLACES
            write_json(path, {"surprise": reference.surprise(prefix), "kl": ratios})
        self.ctx.barrier()

    def improve(self, number: int, reward: str) -> bool:
        """See Phases."""
        self._drawing = self._judge = None
        config = self.policy_config(number)
        target = config.train.exit_at_step or config.train.steps
        newest = next(step_folders(RunFolder(config.run_dir).checkpoints), None)
        stands = int(self.ctx.broadcast(step_of(newest) if newest is not None else 0))
        if stands >= target:
            self.progress = Progress(step=stands)
            return True
        rl = config.required_rl.model_copy(update={"reward": with_model(config.required_rl.reward, reward)})
        last = number == self.options.count
        checkpoint = config.checkpoint.model_copy(update={"export_hf": config.checkpoint.export_hf and last})
        if self.ctx.is_main:
            Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        self.ctx.barrier()
        self.progress = reinforce(config.model_copy(update={"rl": rl, "checkpoint": checkpoint}), self.ctx)
        return self.progress.step >= target


def verdicts(judge: Judge | RewardSource, pairs: Sequence[AnswerPair]) -> list[Verdict]:
    """Which answer of each pair is better, by a judge or by the higher score; equal scores are a tie."""
    if isinstance(judge, Judge):
        return judge.compare([Comparison(prompt_text(a), a.text, b.text) for a, b in pairs])
    scores = [score.value for score in judge.scores([answer for pair in pairs for answer in pair])]
    return [
        Verdict.TIE if first == second else Verdict.FIRST if first > second else Verdict.SECOND
        for first, second in zip(scores[0::2], scores[1::2], strict=True)
    ]


def with_model(reward: Reward, path: str) -> Reward:
    """A reward with another reward model."""
    if isinstance(reward, ModelReward):
        return reward.model_copy(update={"path": path, "adapter": None})
    assert isinstance(reward, Mixture)
    sources = tuple(
        with_model(source, path) if isinstance(source, ModelReward) else source for source in reward.sources
    )
    return reward.model_copy(update={"sources": sources})


def reward_config(config: RunConfig, folder: Path, sources: Sequence[str], start: str | None) -> RunConfig:
    """The configuration of the run that renews the reward model.

    Raises:
        ConfigError: rl.rounds.reward_model is no valid configuration, or not of a reward model.
    """
    rounds = required(config.required_rl.rounds, "rl.rounds")
    path = required(rounds.reward_model, "rl.rounds.reward_model")
    data = {"sources": [{"path": prefix} for prefix in sources], "tokenizer": config.data.tokenizer, "split": "100,0,0"}
    values: dict[str, Any] = {"run_dir": str(folder), "parallel": config.parallel.model_dump(mode="json"), "data": data}
    values["train.eval_interval"] = 0
    if start is not None:
        values |= {"checkpoint.load": start, "checkpoint.init_from_hf": None}
    changes = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    # Without a model of its own, it has the policy's shape.
    found = load_config(path, changes, lambda values: config.model.model_dump(mode="json"))
    if found.objective.kind != "reward":
        raise ConfigError(
            f"{path}: rl.rounds.reward_model trains a reward model, and objective.kind is {found.objective.kind}"
        )
    if not found.checkpoint.interval:
        raise ConfigError(f"{path}: checkpoint.interval is 0: a round goes on from the reward model's checkpoint")
    return found
