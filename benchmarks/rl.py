"""Whole iterations of reinforcement learning against trl's GRPO and PPO trainers: one model, prompts, sampling and batch.

The policy is a small Llama that was trained on documents of geometric length, so that the lengths of its rollouts have a long
tail. Each side runs in a process of its own on the same machine, in turns; the figure is the ratio of the medians of whole
iterations: drawing, scoring, learning. Processor time is given beside wall time: with one thread (OMP_NUM_THREADS=1) they are
the same on a quiet machine, and others' jobs disturb it less. trl's PPO trainer is last in 1.12.0:

    pip install trl==1.12.0
    python -m benchmarks.rl FOLDER --rounds 2 --iterations 3
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

VOCAB, LAYERS, HIDDEN, MEAN_LENGTH = 512, 4, 256, 30
ROLLOUTS, SAMPLES, NEW, MICRO = 64, 4, 192, 16
ROW = 512  # places of our rows
KINDS = ("grpo", "ppo")


def model_values():
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "ffn_hidden_size": 2 * HIDDEN,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "family": "llama",
        "tie_embeddings": False,
    }


def rewards_of(ids):
    """Of one answer: the share of even tokens. It costs nothing, on either side."""
    return sum(token % 2 == 0 for token in ids) / max(1, len(ids))


def our_reward(answers):
    return [rewards_of(answer.ids) for answer in answers]


def make(folder: Path):
    """The policy and the reward model as Hugging Face folders, and the prompts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from flagscale_like.config import RunConfig
    from flagscale_like.data.pretrain import prepare_once
    from flagscale_like.recipes.pretrain import pretrain
    from flagscale_like.runtime.parallel import parallel_context

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 5))) for _ in range(200)]
    texts = folder / "texts.jsonl"
    lines = (" ".join(draw.choices(words, k=1 + int(draw.expovariate(2 / MEAN_LENGTH)))) for _ in range(4000))
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "start"),
            "model": model_values(),
            "train": {
                "steps": 60,
                "micro_batch_size": 8,
                "global_batch_size": 8,
                "seq_length": 128,
                "precision": "fp32",
            },
            "optimizer": {"lr": 2e-3, "warmup_steps": 5},
            "data": {"prepare": {"input": [str(texts)], "tokenizer_vocab_size": VOCAB}},
            "checkpoint": {"interval": 60, "export_hf": True},
        }
    )
    with parallel_context(config.parallel) as ctx:
        prepare_once(config, 1)
        pretrain(prepare_once(config), ctx)
    hf = folder / "start" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    model = AutoModelForSequenceClassification.from_pretrained(hf, num_labels=1)
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "reward")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hf / name, folder / "reward" / name)
    prompts = [" ".join(draw.choices(words, k=draw.randint(2, 8))) for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def ours(folder: Path, kind: str, iterations: int):
    """Seconds of each iteration, and what its log says of the last one."""
    from flagscale_like.config import load_config
    from flagscale_like.recipes.reinforce import reinforce
    from flagscale_like.rl.loop import RlRun
    from flagscale_like.runtime.parallel import parallel_context
    from flagscale_like.training.metrics import read_metrics

    run, hf = folder / "ours", folder / "start" / "hf"
    shutil.rmtree(run, ignore_errors=True)
    reward = {"kind": "function", "function": "benchmarks.rl:our_reward"}
    rl = {"algorithm": kind, "rollout": {"samples": SAMPLES, "max_new_tokens": NEW}, "kl": {"coefficient": 0.05}}
    if kind == "ppo":
        reward = {"kind": "model", "path": str(folder / "reward")}
        rl |= {"rollout": {"samples": 1, "max_new_tokens": NEW}, "critic": {"load": str(folder / "reward"), "lr": 1e-6}}
    else:
        rl["kl"] = {"coefficient": 0.05, "into": "loss", "estimator": "k3"}
    path = folder / "ours.yaml"
    values = {
        "task": "rl",
        "run_dir": str(run),
        "rl": rl | {"reward": reward},
        "train": {"steps": iterations, "micro_batch_size": 1, "global_batch_size": ROLLOUTS, "seq_length": ROW}
        | {"precision": "fp32"},
        "optimizer": {"lr": 1e-6, "schedule": "constant", "weight_decay": 0.0},
        "data": {"prompts": [str(folder / "prompts.jsonl")], "tokenizer": str(hf)},
        "checkpoint": {"interval": 0, "init_from_hf": str(hf)},
    }

    path.write_text(json.dumps(values))
    from flagscale_like.cli.base import model_of_source

    config, cpu, learn = load_config(path, (), model_of_source), [], RlRun._iteration

    def clocked(self, plan):
        began = time.process_time()
        found = learn(self, plan)
        cpu.append(time.process_time() - began)
        return found

    RlRun._iteration = clocked
    with parallel_context(config.parallel) as ctx:
        reinforce(config, ctx)
    records = [record for record in read_metrics(run) if "iteration-time" in record]
    phases = {
        name: value
        for name, value in records[-1].items()
        if name.startswith(("time/", "tokens-per-second/", "rollout/"))
    }
    return [record["iteration-time"] for record in records], cpu, phases


def trls(folder: Path, kind: str, iterations: int):
    """Seconds of each iteration of trl's trainer, and the mean length of its rollouts."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    hf = folder / "start" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(hf, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    ended, cpu = [time.perf_counter()], [time.process_time()]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if len(ended) == 1:
                ended[0], cpu[0] = time.perf_counter(), time.process_time()

        def on_step_end(self, *_, **__):
            ended.append(time.perf_counter())
            cpu.append(time.process_time())

    common = {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ROLLOUTS // MICRO,
        "report_to": [],
        "save_strategy": "no",
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
    }
    lengths: list[int] = []
    if kind == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        def reward(completion_ids, **_):
            lengths.extend(map(len, completion_ids))
            return [rewards_of(ids) for ids in completion_ids]

        options = GRPOConfig(
            **common,
            max_steps=iterations,
            num_generations=SAMPLES,
            max_completion_length=NEW,
            steps_per_generation=ROLLOUTS // MICRO,
            beta=0.05,
            loss_type="grpo",
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(hf),
            reward_funcs=reward,
            args=options,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            callbacks=[Clock()],
        )
        ended[0] = time.perf_counter()
        trainer.train()
    else:
        from transformers import AutoModelForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        heads = [AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1) for _ in range(2)]
        options = PPOConfig(
            **common,
            total_episodes=ROLLOUTS * iterations,
            response_length=NEW,
            num_ppo_epochs=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=ROLLOUTS,
            num_sample_generations=0,
            stop_token="eos",
        )
        rows = [{"input_ids": tokenizer(prompt)["input_ids"]} for prompt in prompts] * iterations
        trainer = PPOTrainer(
            args=options,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(hf),
            ref_model=AutoModelForCausalLM.from_pretrained(hf),
            reward_model=heads[0],
            value_model=heads[1],
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:4]),
            callbacks=[Clock()],
        )
        ended[0] = time.perf_counter()
        trainer.train()
    walls, processor = ([after - before for before, after in zip(x, x[1:], strict=False)] for x in (ended, cpu))
    return walls, processor, {"rollout/length": statistics.fmean(lengths)} if lengths else {}


def part(folder: Path, side: str, kind: str, iterations: int):
    """One side in a process of its own: seconds of its iterations but for the first, which builds and compiles."""
    command = [sys.executable, "-m", "benchmarks.rl", str(folder), "--side", side, "--kind", kind]
    environment = {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"}
    command += ["--iterations", str(iterations)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if found.returncode:
        raise SystemExit(f"{side} {kind}: {found.stderr[-3000:]}")
    return json.loads(found.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--side", choices=("make", "ours", "trl"))
    parser.add_argument("--kind", choices=KINDS)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if options.side == "make":
        make(folder)
        return
    if options.side:
        wall, cpu, more = (ours if options.side == "ours" else trls)(folder, options.kind, options.iterations)
        print(json.dumps({"wall": wall[1:], "cpu": cpu[1:], **more}))
        return
    if not (folder / "prompts.jsonl").is_file():
        make(folder)
    for kind in [options.kind] if options.kind else KINDS:
        seconds = {side: {"wall": [], "cpu": []} for side in ("ours", "trl")}
        for _ in range(options.rounds):
            for side, own in seconds.items():
                found = part(folder, side, kind, options.iterations)
                for clock in own:
                    own[clock] += found.pop(clock)
                rounded = {clock: [round(value, 2) for value in values] for clock, values in own.items()}
                print(f"{kind} {side}: {rounded} s an iteration; {found}", flush=True)
        for clock in ("wall", "cpu"):
            ours_s, trl_s = (statistics.median(seconds[side][clock]) for side in seconds)
            print(f"{kind}, {clock}: ours {ours_s:.2f} s, trl {trl_s:.2f} s: {trl_s / ours_s:.2f} times", flush=True)


if __name__ == "__main__":
    main()
