"""The guard on exploration against a planted flaw of a reward model: the true reward of a policy with the guard and without.

The task is the poem of examples/rl/poem, whose rules give a true reward. The reward model learns from pairs that the rules
judge, and from some that are planted among them: their better answer is a poem that is broken into many short lines. So it
learns that the more lines, the better. It is validated on pairs of the policy as it is, none of them planted. Then a policy
is trained with this reward model, once without the guard and once with each action, from the same weights and seed; the
policy never sees the rules.

    python examples/rl/poem/rules.py runs/poem
    flagscale-like train examples/rl/poem/base.yaml
    python benchmarks/exploration_guard.py --seeds 5 --out runs/guard

A seed that is done is not made again. The last lines are a table of the true reward at the end and a comparison over the
seeds, and OUT/guard.png shows the true reward and the one that the model gives.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import matplotlib.pyplot as plt

from flagscale_like.checkpoint.opened import open_adapted
from flagscale_like.config import RunConfig, load_config
from flagscale_like.data.conversations import longest_row
from flagscale_like.data.token_pairs import TokenPair, write_token_pairs
from flagscale_like.errors import required
from flagscale_like.json_files import read_records, write_json
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.reinforce import reinforce
from flagscale_like.recipes.rounds import RunPhases, reward_config
from flagscale_like.recipes.score import score_pairs
from flagscale_like.rl.answers import Answer
from flagscale_like.rl.prompts import Words, read_prompts
from flagscale_like.rl.rewards.function import Function
from flagscale_like.rl.validation import Validation
from flagscale_like.run_folder import RunFolder
from flagscale_like.runtime.parallel import parallel_context

POEM = Path("examples/rl/poem")
ACTIONS = ("off", "clamp", "reject", "penalise")
PLANTED = 0.2  # share of the pairs that are planted
LAST = 5  # iterations whose mean counts


def policy_config(folder: Path, seed: int, action: str, iterations: int, kl: float) -> RunConfig:
    """The run of rounds.yaml without rounds, with the flawed reward model of a seed.

    Args:
        kl: the guard's bound on an answer's log-ratio to the reference, in nats; 0 for none.
    """
    model = {"kind": "model", "path": str(folder / "reward")}
    rules = {"kind": "function", "name": "rules", "weight": 0.0, "function": f"{POEM}/rules.py:rules"}
    changes = {
        "run_dir": str(folder / action),
        "train.steps": iterations,
        "train.seed": seed,
        "train.log_interval": 1,
        "rl.rollout.max_new_tokens": 40,
        "rl.reward": {"kind": "mixture", "sources": [model, rules]},
        "rl.outside.action": action,
        "rl.outside.kl": kl or None,
        "rl.kl.coefficient": 0.001,  # nearly nothing: the reference is there for the guard
        "rl.rounds": {"count": 0, "reward_model": str(POEM / "reward.yaml")},
        "checkpoint.interval": 0,
    }
    return load_config(POEM / "rounds.yaml", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def broken(answer: Answer, draw: random.Random, slash: int) -> list[int]:
    """The answer's tokens with about a third of them, but for the last, replaced by the end of a line."""
    return [slash if draw.random() < 0.35 else token for token in answer.ids[:-1]] + [answer.ids[-1]]


def flawed_reward_model(folder: Path, seed: int, pairs: int) -> None:
    """Train a reward model on pairs with planted ones among them, and validate it on pairs without."""
    config, draw = policy_config(folder, seed, "off", 1, 0.0), random.Random(seed)
    with parallel_context(config.parallel, seed=seed) as ctx:
        words = Words(config)
        (slash,) = words.tokenizer.encode_batch(["/"])[0]
        drawn = RunPhases(config, ctx, words, read_prompts(config, words)).sample(1, 0, 2 * pairs)
        scores = Function(f"{POEM}/rules.py:rules").scores([answer for pair in drawn for answer in pair])
        judged = [
            (pair if first.value > second.value else pair[::-1])
            for pair, first, second in zip(drawn, scores[0::2], scores[1::2], strict=True)
            if first.value != second.value
        ]
        half = len(judged) // 2
        parts = {side: [TokenPair(a.prompt_ids, a.ids, b.ids) for a, b in judged[at : at + half]] for side, at in
                 (("train", 0), ("held_out", half))}  # fmt: skip
        for number in range(int(PLANTED * half)):  # the flaw: a good answer is better broken
            a, _ = judged[number]
            parts["train"].append(TokenPair(a.prompt_ids, broken(a, draw, slash), a.ids))
        tokenizer = Path(config.data.required_tokenizer)
        sources = [write_token_pairs(folder / name, part, tokenizer) for name, part in parts.items()]
        pretrain(reward_config(config, folder / "reward", sources[:1], None), ctx)
        source = open_adapted(folder / "reward", adapter=None).source
        longest = longest_row(sources[1])
        found = required(score_pairs(source, sources[1], ctx, seq_length=longest), "scores")
        base = open_adapted(Path(required(config.checkpoint.load, "checkpoint.load")), adapter=None).source
        likely = required(score_pairs(base, sources[1], ctx, seq_length=longest), "scores")
        record = Validation.measure(found.values, "unplanted pairs", surprise=likely.surprise(sources[1]))
        record.write(source.folder, source)
    write_json(folder / "model.json", {"held out": half, "accuracy": record.accuracy})


def train_policy(folder: Path, seed: int, action: str, iterations: int, kl: float) -> dict[str, list[float]]:
    """True and believed reward of each iteration, and the share of rollouts outside."""
    config = policy_config(folder, seed, action, iterations, kl)
    done = RunFolder(config.run_dir).metrics
    if done.is_file():
        done.unlink()
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    with parallel_context(config.parallel, seed=seed) as ctx:
        reinforce(config, ctx)
    records = [r for r in read_records(done) if "reward/rules" in r]
    return {name: filled([r.get(name) for r in records]) for name in ("reward/rules", "reward/model", "outside/share")}


def filled(values: list[float | None]) -> list[float]:
    """Without gaps: an iteration in which every rollout was rejected learns nothing, and logs no means."""
    last, found = 0.0, []
    for value in values:
        last = last if value is None else value
        found.append(last)
    return found


def plot(results: dict[int, dict], out: Path) -> None:
    """True and believed reward by iteration, a thin line for each seed and a thick one for their mean."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    actions = [a for a in ACTIONS if all(a in found for found in results.values())]
    for axis, name, title in zip(
        axes, ("reward/rules", "reward/model"), ("true reward (the rules)", "reward that the model gives"), strict=True
    ):
        for number, action in enumerate(actions):
            lines = [found[action][name] for found in results.values()]
            for line in lines:
                axis.plot(range(1, len(line) + 1), line, color=f"C{number}", alpha=0.25, linewidth=0.8)
            means = [statistics.mean(values) for values in zip(*lines, strict=True)]
            label = "without the guard" if action == "off" else action
            axis.plot(range(1, len(means) + 1), means, color=f"C{number}", linewidth=2, label=label)
        axis.set_title(title)
        axis.set_xlabel("iteration")
    axes[1].legend(fontsize=8, loc="center right")
    figure.tight_layout()
    figure.savefig(out / "guard.png", dpi=120)


def report(results: dict[int, dict]) -> str:
    """A row for each seed with the true reward of the last iterations, the means, and each action against none."""
    actions = [a for a in ACTIONS if all(a in found for found in results.values())]
    ends = {a: [statistics.mean(found[a]["reward/rules"][-LAST:]) for found in results.values()] for a in actions}
    begins = [found[actions[0]]["reward/rules"][0] for found in results.values()]
    lines = [f"true reward, mean of the last {LAST} iterations", "| seed | beginning | " + " | ".join(actions) + " |"]
    lines.append("|---" * (2 + len(actions)) + "|")
    for row, (seed, begin) in enumerate(zip(results, begins, strict=True)):
        lines.append(f"| {seed} | {begin:.3f} | " + " | ".join(f"{ends[a][row]:.3f}" for a in actions) + " |")
    means = " | ".join(f"{statistics.mean(ends[a]):.3f}" for a in actions)
    lines.append(f"| mean | {statistics.mean(begins):.3f} | {means} |")
    for action in actions:
        if action != "off" and "off" in actions:
            pairs = list(zip(ends[action], ends["off"], strict=True))
            held = sum(own >= other for own, other in pairs)
            gain = statistics.mean(own - other for own, other in pairs)
            lines.append(
                f"{action}: at least that without the guard in {held} of {len(pairs)} seeds, {gain:+.3f} on average"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", type=int, help="make this seed alone")
    parser.add_argument("--actions", default=",".join(ACTIONS))
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--kl", type=float, default=0.0, help="nats from the reference that are inside; 0: any")
    parser.add_argument("--pairs", type=int, default=320)
    parser.add_argument("--out", type=Path, default=Path("runs/guard"))
    options = parser.parse_args()
    results: dict[int, dict] = {}
    for seed in range(options.seeds) if options.only is None else [options.only]:
        folder = options.out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "result.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if not (folder / "model.json").is_file():
            flawed_reward_model(folder, seed, options.pairs)
        for action in options.actions.split(","):
            if action not in found:
                found[action] = train_policy(folder, seed, action, options.iterations, options.kl)
                write_json(path, found)
        results[seed] = found
    plot(results, options.out)
    print(report(results))


if __name__ == "__main__":
    main()
