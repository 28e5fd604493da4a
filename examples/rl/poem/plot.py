"""Draw the curves of the poem: `python examples/rl/poem/plot.py runs/poem poem.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from flagscale_like.json_files import read_records
from flagscale_like.rl.rounds import read_rounds


def main(runs: Path, out: Path) -> None:
    """Left the true reward of both runs; right what the reward model gives, and its accuracy in each round."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    learned = [r for r in read_records(runs / "rules" / "metrics.jsonl") if "reward/mean" in r]
    left.plot([r["step"] for r in learned], [r["reward/mean"] for r in learned], label="the rules as reward")
    rounds = [r for r in read_records(runs / "rounds" / "metrics.jsonl") if "reward/rules" in r]
    left.plot([r["step"] for r in rounds], [r["reward/rules"] for r in rounds], label="a reward model, in rounds")
    left.set_title("how well poems keep the rules")
    left.legend()
    right.plot([r["step"] for r in rounds], [r["reward/model"] for r in rounds], color="C1")
    right.set_title("what the reward model gives")
    found = read_rounds(runs / "rounds" / "rounds")
    for number, record in enumerate(found):
        begin = number * rounds[-1]["step"] / len(found)
        verdict = "accepted" if record["accepted"] else "refused"
        for axis in (left, right):
            axis.axvline(begin, color="0.8", linewidth=0.8, zorder=0)
        right.annotate(f"round {record['round']}: {record['accuracy']:.0%}, {verdict}", (begin + 0.5, 0.03 + 0.08 * number),
                       xycoords=("data", "axes fraction"), fontsize=8)  # fmt: skip
    for axis in (left, right):
        axis.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
