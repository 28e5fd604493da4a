"""Where rewards come from, what happens outside of what a reward model can judge, and rounds: groups of `rl`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale_like.arch import Frozen
from flagscale_like.config.groups import PathText


class ModelReward(Frozen):
    """A reward model: the value head's output at an answer's last token, the mean over its heads.

    Attributes:
        kind: `model`.
        name: of this source in the log and in a mixture.
        weight: factor on its reward in a mixture.
        path: a run or checkpoint of objective.kind reward, or its Hugging Face folder. Without it, the one that the first
            of rl.rounds makes.
        adapter: LoRA adapters for these weights.
        tokenizer: `same` refuses a reward model with another tokenizer than the policy's. `text` gives it the texts, which
            its own tokenizer and chat template make tokens of.
        precision: of its weights and activations.
        micro_batch_size: rows of one forward pass.
    """

    kind: Literal["model"]
    name: str = "model"
    weight: float = 1.0
    path: PathText | None = None
    adapter: PathText | None = None
    tokenizer: Literal["same", "text"] = "same"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch_size: int = Field(default=1, gt=0)


class FunctionReward(Frozen):
    """A Python function, which gets a list of rl.answers.Answer and returns a number for each.

    Attributes:
        kind: `function`.
        name: of this source in the log and in a mixture.
        weight: factor on its reward in a mixture.
        function: `package.module:function`, or `path/to/file.py:function`.
    """

    kind: Literal["function"]
    name: str = "function"
    weight: float = 1.0
    function: str = Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")


class CommandReward(Frozen):
    """A program, which reads a JSON line for each answer (prompt, text, fields, finish) and prints one with its `score`.

    Attributes:
        kind: `command`.
        name: of this source in the log and in a mixture.
        weight: factor on its reward in a mixture.
        command: the program and its arguments; no shell reads them.
        timeout_s: how long it may take for the answers of one call.
    """

    kind: Literal["command"]
    name: str = "command"
    weight: float = 1.0
    command: tuple[str, ...] = Field(min_length=1)
    timeout_s: float = Field(default=600.0, gt=0)


class JudgeReward(Frozen):
    """A language model that is asked which of two answers to a prompt is better (RLAIF, Lee et al. 2023).

    Each pair is asked in both orders, because judges favour a place (Zheng et al. 2023); two different verdicts are a tie. As
    a reward, an answer is compared with others of its prompt, and gets the share that it wins; a tie is half a win.

    Attributes:
        kind: `judge`.
        name: of this source in the log and in a mixture.
        weight: factor on its reward in a mixture.
        url: of an OpenAI-compatible server, such as http://localhost:8000/v1; or
        path: a run, a checkpoint or a Hugging Face folder, which our own generation engine asks.
        model: what the server calls the model.
        api_key_env: name of the environment variable with the server's key; it is never written.
        instruction: a file with the question, in which {prompt}, {first} and {second} are replaced. Without it, a short one.
        opponents: other answers of the prompt that each answer is compared with, as a reward.
        max_new_tokens: of a verdict.
        timeout_s: of one request.
        concurrent: requests at a time.
        retries: how often a request is sent again that the server does not answer, or answers with 429 or 5xx.
        unparsed_limit: share of the verdicts that may say neither answer; above it the run stops.
        labelled: pairs with a known better answer (JSON lines as `data pairs` reads them). Before its first verdict the judge
            is asked about them, and the share on which it agrees is reported.
        agreement: the run stops where the judge agrees with fewer of them.
    """

    kind: Literal["judge"]
    name: str = "judge"
    weight: float = 1.0
    url: str | None = None
    path: PathText | None = None
    model: str = "default"
    api_key_env: str | None = None
    instruction: PathText | None = None
    opponents: int = Field(default=1, gt=0)
    max_new_tokens: int = Field(default=16, gt=0)
    timeout_s: float = Field(default=60.0, gt=0)
    concurrent: int = Field(default=8, gt=0)
    retries: int = Field(default=3, ge=0)
    unparsed_limit: float = Field(default=0.1, ge=0, le=1)
    labelled: PathText | None = None
    agreement: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> JudgeReward:
        if (self.url is None) == (self.path is None):
            raise ValueError("give the judge either url, of a server, or path, of a model for our own engine")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url ({self.url!r}) must begin with http:// or https://")
        if self.agreement and self.labelled is None:
            raise ValueError("agreement is with a labelled set: name its file in labelled")
        return self


Source = Annotated[ModelReward | FunctionReward | CommandReward | JudgeReward, Field(discriminator="kind")]


class Mixture(Frozen):
    """The weighted sum of several rewards.

    Attributes:
        kind: `mixture`.
        sources: the rewards, each with its name and weight.
    """

    kind: Literal["mixture"]
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Mixture:
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources have the name {twice[0]!r} twice: give each a name of its own")
        if taken := sorted({"mean", "deviation"} & set(names)):
            raise ValueError(
                f"a source has the name {taken[0]!r}, which the log has for the whole reward: choose another"
            )
        return self


Reward = Annotated[ModelReward | FunctionReward | CommandReward | JudgeReward | Mixture, Field(discriminator="kind")]
"""Where the reward of an answer comes from."""


def sources_of(reward: Reward) -> tuple[Source, ...]:
    """The sources of a mixture, or the one source that a reward is."""
    return reward.sources if isinstance(reward, Mixture) else (reward,)


def judges(reward: Reward) -> bool:
    """Whether a judge takes part in a reward."""
    return any(isinstance(source, JudgeReward) for source in sources_of(reward))


def model_in(reward: Reward) -> ModelReward | None:
    """The one reward model of a reward; None where there is none, or several."""
    found = [source for source in sources_of(reward) if isinstance(source, ModelReward)]
    return found[0] if len(found) == 1 else None


class Outside(Frozen):
    """The guard on exploration: what happens to a rollout outside of what the reward model was validated on.

    A reward model says nothing about answers unlike those that it was validated on, and a policy finds those that it scores
    too high (Gao et al. 2023). Its validation record (`score --keep`, or the end of its training) has the quantiles of its
    scores on held-out answers, its accuracy by score, and how far its heads disagree (Coste et al. 2023). A rollout is
    outside where

        its score is beyond `scores`, quantiles of the record; or in a band whose accuracy is below `accuracy`; or
        its heads disagree more than the quantile `disagreement` of the record; or
        the reference finds it less likely, by token, than the quantile `surprise` of the record; or
        its log-ratio to the reference is above `kl` nats.

    Attributes:
        action: `off`; `clamp` gives the rollout at most the record's median, the score of a typical answer; `reject` leaves
            it out, and another is drawn; `penalise` clamps, and subtracts `penalty`. A score below the lowest bound is put
            on it in any case. Without it, `clamp` where the reward has one reward model that was validated, and `off`
            otherwise.
        scores: lowest and highest quantile of the record's scores that is inside.
        disagreement: quantile of the record's disagreement; 1 allows any.
        surprise: quantile of the record's surprise, minus the log-probability under the reference in nats a token; 1 allows
            any.
        accuracy: least accuracy on held-out pairs of a score's band; 0 allows any.
        kl: highest log-ratio of a whole answer, in nats; or `validated`: the record's quantile `scores[1]`, so that a round's
            policy goes no further from the reference than the answers that its reward model was validated on. In the first
            round, whose policy is the reference, that bounds nothing.
        penalty: standard deviations of the record's scores that are subtracted.
        refill: how often an iteration draws again for what was rejected.
        keep: rollouts outside that are kept as first candidates for labelling, in RUN_DIR/outside.jsonl; the oldest go first.
    """

    action: Literal["off", "clamp", "reject", "penalise"] | None = None
    scores: tuple[float, float] = (0.005, 0.995)
    disagreement: float = Field(default=0.99, gt=0, le=1)
    surprise: float = Field(default=0.995, gt=0, le=1)
    accuracy: float = Field(default=0.0, ge=0, le=1)
    kl: Annotated[float, Field(gt=0)] | Literal["validated"] | None = None
    penalty: float = Field(default=1.0, gt=0)
    refill: int = Field(default=2, ge=0)
    keep: int = Field(default=10_000, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Outside:
        low, high = self.scores
        if not 0 <= low < high <= 1:
            raise ValueError(f"outside.scores ({low}, {high}) must be two quantiles that rise, from 0 to 1")
        return self


class Rounds(Frozen):
    """Rounds: policy and reward model are renewed in turns (Bai et al. 2022, section 4.5).

    A round samples pairs of answers from the policy, has them judged, renews the reward model on the pairs of all rounds, and
    trains the policy with it. A reward model that is worse than the last one on the held-out pairs of all rounds is refused,
    and the last one stays.

    Attributes:
        count: rounds; 0 makes none.
        iterations: of the policy in each round.
        pairs: pairs that are judged in each round. Rollouts that the guard kept come first.
        judge: what judges them; the better answer is the one with the higher score, and equal scores are dropped.
        reward_model: YAML of a run with objective.kind reward, which renews the reward model. Its run_dir, parallel, data and
            checkpoint.load are set by the round: it begins with the last reward model, or, where there is none, with the
            weights that the YAML names.
        held_out: share of each round's pairs that no reward model is trained on.
        tolerance: by how much the accuracy on the held-out pairs may fall.
        restart_policy: begin each round's policy from the weights that the run began with, not from those of the last round.
    """

    count: int = Field(default=0, ge=0)
    iterations: int = Field(default=0, ge=0)
    pairs: int = Field(default=256, gt=0)
    judge: Reward | None = None
    reward_model: PathText | None = None
    held_out: float = Field(default=0.2, gt=0, lt=1)
    tolerance: float = Field(default=0.0, ge=0, le=1)
    restart_policy: bool = False

    @model_validator(mode="after")
    def _check(self) -> Rounds:
        if not self.count:
            return self
        if not self.iterations:
            raise ValueError("rounds.iterations is 0: give the policy's iterations of each round")
        if self.judge is None or self.reward_model is None:
            missing = "judge" if self.judge is None else "reward_model"
            raise ValueError(
                f"rounds.{missing} is not given: a round needs a judge, and a YAML of the reward model's run"
            )
        if round(self.pairs * self.held_out) < 1 or round(self.pairs * self.held_out) >= self.pairs:
            raise ValueError(f"rounds.held_out ({self.held_out}) of {self.pairs} pairs leaves a side without pairs")
        return self
