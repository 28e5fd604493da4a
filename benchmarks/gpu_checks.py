"""What has to hold on a GPU: the CPU's losses, texts and rewards, offload, and checkpoints under a kill.

    python benchmarks/gpu_checks.py losses FOLDER
    python benchmarks/gpu_checks.py rl FOLDER
    python benchmarks/gpu_checks.py offload FOLDER
    python benchmarks/gpu_checks.py kill FOLDER

gpu_first.py runs these checks. Each prints what it found, one line for each fact, and exits with 1 if something does not
hold. FLAGSCALE_LIKE_DEVICE
says which device is checked, as everywhere; the default is the one that the machine has.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import yaml  # noqa: E402

from flagscale_like.checkpoint.manifest import step_name  # noqa: E402
from flagscale_like.config import RunConfig  # noqa: E402
from flagscale_like.run_folder import RunFolder  # noqa: E402
from flagscale_like.training.metrics import read_metrics  # noqa: E402

STEPS, SHARED_STEPS = 12, 4  # of a run; of those that the CPU makes for both devices

# One model for each branch of the code that a device can get wrong.
SHAPES: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope, fused loss": {"kernels": {"linear_cross_entropy": "fused"}},
    "alibi, norm head": {"model": {"position": {"kind": "alibi"}, "norm_head": True, "num_query_groups": None}},
    "window, qk norm": {"model": {"sliding_window": 48, "qk_norm": True}},
    "piecewise": {"model": {"position": {"kind": "nlpe", "threshold": 48}}},
    "experts": {
        "model": {"experts": {"count": 8, "top_k": 2, "ffn_hidden_size": 64, "coefficient": 0.01, "z_loss": 1e-3}}
    },
    "latent attention": {
        "model": {
            "num_query_groups": None,
            "latent_attention": {
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
            },
        }
    },
    "recompute": {"train": {"recompute": "full"}},
}
# Largest relative difference from the CPU's loss and gradient norm: the same arithmetic in another order; bf16's rounding.
ALLOWED = {"fp32": (2e-5, 1e-3), "bf16": (2e-3, 5e-2)}
RL_WORDS = 257  # of the tokenizer of the runs of task rl
RL_PLACES: dict[str, dict[str, str]] = {"cpu": {"FLAGSCALE_LIKE_DEVICE": "cpu"}, "device": {}}
RL_ALLOWED = 1e-2  # largest relative difference of a number of an iteration: texts are drawn alike, sums are not


def configuration(run_dir: Path, changes: dict[str, Any]) -> RunConfig:
    """A run of a small model on synthetic tokens. `changes` of groups and of top-level keys; None leaves a key out."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": 3,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "ffn_hidden_size": 512,
            "vocab_size": 1000,
            "max_position_embeddings": 256,
        },
        "train": {
            "steps": STEPS,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "seq_length": 128,
            "precision": "fp32",
            "log_interval": 1,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "data": {"synthetic": True},
        "checkpoint": {"interval": SHARED_STEPS, "keep": 9},
    }
    for group, keys in changes.items():
        if isinstance(keys, dict):
            keys = {k: v for k, v in {**values.get(group, {}), **keys}.items() if v is not None}
        values[group] = keys
    return RunConfig.model_validate({"run_dir": str(run_dir), **values})


def losses_of(run_dir: Path) -> dict[int, tuple[float, float]]:
    """(training loss, gradient norm) by step; empty of a run that has not begun."""
    if not RunFolder(run_dir).metrics.exists():
        return {}
    return {r["step"]: (r["lm loss"], r["grad-norm"]) for r in read_metrics(run_dir) if "lm loss" in r}


def train_here(configs: list[Path]) -> None:
    """Train runs one after the other in this process. A run that fails is said, and the next one begins."""
    from flagscale_like.recipes.pretrain import pretrain
    from flagscale_like.recipes.reinforce import reinforce
    from flagscale_like.runtime.parallel import parallel_context

    for path in configs:
        config, log = RunConfig.model_validate(yaml.safe_load(path.read_text())), io.StringIO()
        try:
            with contextlib.redirect_stdout(log), parallel_context(config.parallel, seed=config.train.seed) as ctx:
                (reinforce if config.task == "rl" else pretrain)(config, ctx)
        except Exception:  # whatever a device raises is a finding
            print(f"{path.stem}: failed\n{log.getvalue()[-1000:]}\n{traceback.format_exc()[-3000:]}", flush=True)


def start(configs: list[Path], **environment: str) -> subprocess.Popen:
    """A process that trains these runs."""
    command = [sys.executable, __file__, "train", *map(str, configs)]
    return subprocess.Popen(command, env={**os.environ, **environment})


def train_all(configs: list[Path], **environment: str) -> None:
    """Train runs in as many processes as the machine has pairs of cores, at most 8."""
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    started = [start(configs[i::processes], **environment, OMP_NUM_THREADS="2") for i in range(processes)]
    for process in started:
        process.wait()


def written(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path


def check_losses(folder: Path) -> bool:
    """Each shape begins on the CPU, and goes on from the CPU's checkpoint on both devices."""
    runs = [
        (name, precision, changes | {"train": {**changes.get("train", {}), "precision": precision}})
        for name, changes in SHAPES.items()
        for precision in ("fp32", "bf16")
    ]
    places = {side: folder / side for side in ("cpu", "device")}
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)

    def file(side: str, number: int) -> Path:
        name, precision, changes = runs[number]
        label = f"{number:02} {name} {precision}".replace(" ", "-").replace(",", "")
        return written(configuration(places[side] / label, changes), places[side] / f"{label}.yaml")

    numbers = range(len(runs))
    files = {side: [file(side, number) for number in numbers] for side in places}
    train_all(files["cpu"], FLAGSCALE_LIKE_DEVICE="cpu")
    for cpu, device in zip(*files.values(), strict=True):
        _share_beginning(cpu.with_suffix(""), device.with_suffix(""))
    try:
        train_all(files["device"])
    except KeyboardInterrupt:  # gpu_first.py, before the time is over
        print("BAD   interrupted; what the runs have done:")
    results = [
        _compared(f"{name}, {precision}", *(losses_of(files[side][i].with_suffix("")) for side in places), precision)
        for i, (name, precision, _) in enumerate(runs)
    ]
    return all(results)


def _compared(name: str, cpu: dict, device: dict, precision: str) -> bool:
    """Whether a run on the device has the losses and gradient norms of the CPU's; says how far they are."""
    steps = range(SHARED_STEPS + 1, STEPS + 1)
    if not all(step in cpu and step in device for step in steps):
        print(f"BAD   {name}: made steps {sorted(cpu)} on the CPU and {sorted(device)} on the device")
        return False
    worst = [max(abs(device[step][i] / cpu[step][i] - 1) for step in steps) for i in (0, 1)]
    holds = all(far <= allowed for far, allowed in zip(worst, ALLOWED[precision], strict=True))
    print(
        f"{'ok ' if holds else 'BAD'}   {name}: loss {device[STEPS][0]:.5f}, at most {worst[0]:.1e} from the CPU's "
        f"(allowed {ALLOWED[precision][0]:.0e}); gradient norm {device[STEPS][1]:.4f}, {worst[1]:.1e} "
        f"({ALLOWED[precision][1]:.0e})"
    )
    return holds


def _share_beginning(source: Path, target: Path, steps: int = SHARED_STEPS) -> None:
    """Copy a run as it was after `steps` steps."""
    if not source.exists():
        return
    shutil.copytree(source, target)
    kept = RunFolder(target).checkpoints / step_name(steps)
    for checkpoint in kept.parent.iterdir():
        if checkpoint.is_dir() and checkpoint != kept:
            shutil.rmtree(checkpoint)
    (target / "metrics.jsonl").unlink()


def small_ids(answers: Sequence[Any]) -> list[float]:
    """A reward: the share of an answer's tokens that are below 64."""
    return [sum(token < 64 for token in answer.ids) / max(1, len(answer.ids)) for answer in answers]


def rl_configuration(run_dir: Path, folder: Path, algorithm: str, steps: int) -> RunConfig:
    """A run of task rl on the words of `folder`: 8 prompts an iteration, 4 answers of 12 tokens each."""
    rollout = {"samples": 4, "max_new_tokens": 12}
    reward = {"kind": "function", "function": "benchmarks.gpu_checks:small_ids"}
    changes = {
        "task": "rl",
        "rl": {"algorithm": algorithm, "reward": reward, "kl": {"coefficient": 0.02}, "rollout": rollout},
        "data": {"synthetic": None, "prompts": [str(folder / "prompts.jsonl")], "tokenizer": str(folder / "tokenizer")},
        "model": {"vocab_size": RL_WORDS + 3},
        "optimizer": {"warmup_steps": 0, "schedule": "constant"},
        "train": {"steps": steps, "global_batch_size": 32, "log_interval": 1},
        "checkpoint": {"interval": 1},
    }
    return configuration(run_dir, changes)


def check_rl(folder: Path) -> bool:
    """The CPU's greedy text, and the CPU's numbers of one iteration of GRPO and one of PPO from the CPU's checkpoint."""
    from flagscale_like.data.tokenizer import train_bpe

    train_bpe(["plain words for a plain tokenizer"], RL_WORDS, folder / "tokenizer")
    prompts = [{"prompt": text} for text in ("red", "green and blue", "an old house", "new")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts * 4))

    def files(side: str, steps: int) -> list[Path]:
        (folder / side).mkdir(exist_ok=True)
        runs = {name: folder / side / name for name in ("grpo", "ppo")}
        return [written(rl_configuration(runs[n], folder, n, steps), runs[n].with_suffix(".yaml")) for n in runs]

    train_all(files("cpu", 1), FLAGSCALE_LIKE_DEVICE="cpu")
    for cpu, device in zip(files("cpu", 2), files("device", 2), strict=True):
        _share_beginning(cpu.with_suffix(""), device.with_suffix(""), 1)
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(train_all, files(side, 2), **place) for side, place in RL_PLACES.items()]
        asked = {side: pool.submit(_greedy, folder / "cpu" / "grpo", folder, **RL_PLACES[side]) for side in RL_PLACES}
        texts = {side: text.result() for side, text in asked.items()}
        for run in runs:
            run.result()
    same = texts["cpu"] == texts["device"] and bool(texts["cpu"])
    said = "the CPU's" if same else texts
    print(f"{'ok ' if same else 'BAD'}   greedy text of 32 tokens: {said}")
    return all([same, *(_same_iteration(folder, name) for name in ("grpo", "ppo"))])


def _greedy(run_dir: Path, folder: Path, **environment: str) -> str:
    """What `generate` prints of a run's first checkpoint; empty where it fails, which says why."""
    checkpoint = RunFolder(run_dir).checkpoints / step_name(1)
    command = [
        sys.executable,
        "-m",
        "flagscale_like",
        "generate",
        "--checkpoint",
        str(checkpoint),
        "--prompt",
        "an old",
    ]
    command += ["--tokenizer", str(folder / "tokenizer"), "--max-new-tokens", "32", "--temperature", "0"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        print(f"BAD   generate: exit code {done.returncode}: {done.stderr[-600:]}")
    return done.stdout


def _same_iteration(folder: Path, name: str) -> bool:
    """Whether the second iteration on the device has the CPU's numbers; says which is farthest."""
    found = [_iteration(folder / side / name) for side in RL_PLACES]
    if not all(found) or found[0].keys() != found[1].keys():
        print(f"BAD   {name}: the second iteration reported {[sorted(numbers) for numbers in found]}")
        return False
    far = {key: abs(found[1][key] - found[0][key]) / max(1e-3, abs(found[0][key])) for key in found[0]}
    worst = max(far, key=lambda key: (far[key] != far[key], far[key]))
    holds = far[worst] <= RL_ALLOWED
    print(
        f"{'ok ' if holds else 'BAD'}   {name}: {len(far)} numbers of an iteration from the CPU's checkpoint, farthest "
        f"{worst}: {found[1][worst]:.6g} and the CPU's {found[0][worst]:.6g} (allowed {RL_ALLOWED:.0e})"
    )
    return holds


def _iteration(run_dir: Path) -> dict[str, float]:
    """What the second iteration reported, but for times, memory and speeds."""
    records = read_metrics(run_dir) if RunFolder(run_dir).metrics.exists() else []
    names = ("policy", "reward/", "kl/", "value/", "rollout/", "grad-norm")
    for record in records:
        if record.get("step") == 2 and "iteration-time" in record:
            return {key: value for key, value in record.items() if key.startswith(names)}
    return {}


def check_offload(folder: Path) -> bool:
    """Offload changes no bit of a loss, and lowers the peak of the device's memory."""
    from flagscale_like.runtime.platforms import get_platform

    platform, peaks, losses = get_platform(), {}, {}
    for share in (0.0, 1.0):
        shape = {
            "model": {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1408, "max_position_embeddings": 1024},
            "train": {"seq_length": 1024, "micro_batch_size": 4, "precision": "bf16" if platform.bf16 else "fp32"},
            "checkpoint": {"interval": 0},
        }
        if not platform.counts_device_memory:  # a trial without a device
            shape["model"] = {"num_layers": 2}
            shape["train"] = {"seq_length": 128, "micro_batch_size": 4}
        config = configuration(folder / f"share-{share:g}", shape | {"offload": {"share": share}})
        if platform.counts_device_memory:
            platform.reset_peak_memory()
        train_here([written(config, folder / f"share-{share:g}.yaml")])
        losses[share] = losses_of(folder / f"share-{share:g}")
        peaks[share] = platform.peak_memory_bytes() if platform.counts_device_memory else 0
    same = losses[0.0] == losses[1.0] and len(losses[0.0]) == STEPS
    print(f"{'ok ' if same else 'BAD'}   losses with and without offload: {'every bit equal' if same else losses}")
    if not platform.counts_device_memory:
        print("      this device counts no memory of its own")
        return same
    lower = peaks[1.0] < peaks[0.0]
    print(
        f"{'ok ' if lower else 'BAD'}   peak of device memory: {peaks[0.0] / 2**20:.0f} MiB without, "
        f"{peaks[1.0] / 2**20:.0f} MiB with offload"
    )
    return same and lower


def check_kill(folder: Path) -> bool:
    """A run that is killed with SIGKILL while it saves in the background goes on with the bits of one that is not."""
    shape = {"checkpoint": {"interval": 2, "keep": 9}, "train": {"steps": 40}}
    files = {
        name: written(configuration(folder / name, shape), folder / f"{name}.yaml") for name in ("whole", "killed")
    }
    whole = start([files["whole"]])
    victim, deadline = start([files["killed"]]), time.monotonic() + 120
    while victim.poll() is None and time.monotonic() < deadline:
        if max(losses_of(folder / "killed"), default=0) >= 9:
            victim.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    victim.wait()
    whole.wait()
    before = max(losses_of(folder / "killed"), default=0)
    start([files["killed"]]).wait()
    found = [losses_of(folder / name) for name in files]
    same = found[0] == found[1] and len(found[0]) == 40
    print(
        f"{'ok ' if same else 'BAD'}   killed after step {before} of 40 with saves every 2 steps: "
        f"{'it went on, every bit of the losses equal' if same else [list(f.items())[-3:] for f in found]}"
    )
    if before >= 40:
        print("BAD   the run was over before it could be killed")
    return same and before < 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("losses", "rl", "offload", "kill", "train"))
    parser.add_argument("paths", nargs="+", type=Path, help="a folder; of `train`, the YAML files of runs")
    args = parser.parse_args()
    if args.check == "train":
        train_here(args.paths)
        return
    (folder,) = args.paths
    folder.mkdir(parents=True, exist_ok=True)
    checks = {"losses": check_losses, "rl": check_rl, "offload": check_offload, "kill": check_kill}
    sys.exit(not checks[args.check](folder))


if __name__ == "__main__":
    main()
