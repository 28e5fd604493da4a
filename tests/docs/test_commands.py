"""Every command in the docs that can run here is run, and every message on the troubleshooting page is a real one.

The commands run in order, in a folder that has what they name, on ranks forked from the warm server: `train` on as many as
its layout has, the others on one. What would take minutes is made smaller where SMALLER says so.
"""

import re
import shlex
import shutil
import subprocess

import pytest

from flagscale_like.checkpoint.format import CheckpointReader
from flagscale_like.checkpoint.hf import export
from tests.commands import run_commands
from tests.docs.pages import commands, messages
from tests.harness import REPOSITORY

# Added to commands as they are written: fewer steps, less text.
SMALLER = {
    "train": ["train.steps=4", "optimizer.warmup_steps=1", "train.eval_interval=0", "checkpoint.interval=2"],
    "tiny.yaml": [
        "data.prepare.input=[text]",
        "model.vocab_size=512",
        "data.prepare.tokenizer_vocab_size=512",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
    ],
    "bench": ["--steps", "1", "--warmup", "0"],
    "evaluate": ["--seq-length", "256"],
}
RUN = [command for command in commands() if not command.not_run]


def ranks_of(words):
    """Ranks that `train` or `evaluate` starts by itself on a CPU."""
    text = " ".join(words)
    degrees = [
        int(re.search(rf"(?:parallel\.|--){name}[= ](\d+)", text)[1]) for name in ("tp", "pp") if f"{name}=" in text
    ]
    degrees += [int(n) for n in re.findall(r"--(?:tp|pp) (\d+)", text)]
    ranks = 1
    for degree in degrees:
        ranks *= degree
    return 1 if words[0] not in ("train", "evaluate") or {"--dry-run", "--print-config"} & set(words) else ranks


def smaller(words):
    """A command with what makes it quick."""
    if words[0] == "train" and not {"--dry-run", "--print-config"} & set(words):
        words = [words[0], words[1], *words[2:], *SMALLER["train"]]
        return words + (SMALLER["tiny.yaml"] if words[1].endswith("tiny.yaml") else [])
    return words + SMALLER.get(words[0], [])


TEXT = "def main(argument):\n    return argument + 1\n\n\nclass Model:\n    width = 4\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages name: examples/, launch/, runs/demo, X.yaml, a Hugging Face folder, some text."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("examples", "launch"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "text").mkdir()
    for n in range(60):  # enough for the two hundredths that are for validation
        (folder / "text" / f"{n}.txt").write_text(TEXT * (n % 12 + 8))
    (folder / "heldout.txt").write_text(TEXT * 20)
    (folder / "prompts.jsonl").write_text('{"prompt": "def main("}\n{"prompt": "class", "temperature": 0}\n')
    (folder / "hosts.txt").write_text("node1 slots=8\nnode2 slots=8    # comments are allowed\n")
    tiny = "examples/aquila2/tiny.yaml"
    prepared = ["preprocess", "text", "--train-tokenizer", "300", "--out", "corpus"]
    demo = ["train", tiny, "run_dir=runs/demo", "model.hidden_size=64", *SMALLER["train"], *SMALLER["tiny.yaml"]]
    (made,) = run_commands([prepared, demo, ["train", tiny, "--print-config"]], folder)
    assert [found.exit_code for found in made] == [0, 0, 0], made
    (folder / "X.yaml").write_text(made[2].printed)
    export(CheckpointReader(folder / "runs/demo/checkpoints/step_00000004"), folder / "SmolLM2-135M", dtype="fp32")
    shutil.copytree(folder / "runs/demo/data/tokenizer", folder / "SmolLM2-135M", dirs_exist_ok=True)
    (folder / "Llama-3.2-1B").symlink_to("SmolLM2-135M")
    return folder


def page_order():
    pages = {}
    for command in RUN:
        if not command.long and command.words and command.words[0] in ("flagscale-like", "cd"):
            pages.setdefault(command.page, []).append(command)
    return pages


@pytest.mark.parametrize("page", page_order())
def test_every_command_of_a_page_runs(page, place):
    folder = place
    batch, shown = [], []

    def flush():
        if batch:
            for words, found in zip(shown, run_commands(batch, folder)[0], strict=True):
                said = f"{page}: {shlex.join(words)}: {found.error}\n{found.printed[-1500:]}"
                assert found.exit_code == 0, said
                assert "\x1b" not in found.printed, f"{page}: {shlex.join(words)}: colours into a pipe"
            batch.clear()
            shown.clear()

    for command in page_order()[page]:
        words = command.words[1:]
        if command.page == "quickstart.md" and words[0] != "doctor":
            folder = place / "first-run" if words[0] != "init" else place
        ranks = ranks_of(words)
        if ranks == 1:
            batch.append(smaller(words))
            shown.append(words)
            if words[0] == "init":
                flush()
            continue
        flush()
        found = run_commands([smaller(words)], folder, ranks=ranks)
        assert [rank[0].exit_code for rank in found] == [0] * ranks, f"{command}: {found[0]}"
    flush()


@pytest.mark.parametrize("command", [c for c in RUN if "launch/" in c.text], ids=str)
def test_every_launch_command_runs_dry(command, place):
    assert "--dry-run" in command.words
    shown = subprocess.run(["bash", "-c", command.text], cwd=place, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "flagscale_like" in shown.stdout or "runs/logs" in shown.stdout


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [c for c in RUN if c.long], ids=str)
def test_every_long_command_runs(command):
    done = subprocess.run(["bash", "-c", command.text], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_is_left_out_without_a_reason():
    known = [c for c in commands() if c.not_run or c.long or c.words[0] == "flagscale-like" or "launch/" in c.text]
    assert [str(c) for c in commands() if c not in known] == []
    assert len(RUN) > 30


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder as `init` and a short run leave it, with the broken files that the troubleshooting page meets."""
    folder = tmp_path_factory.mktemp("trouble")
    steps = [["init", "here"], ["train", "run.yaml", "train.steps=4", *SMALLER["train"][1:]]]
    run_commands(steps[:1], folder)
    folder = folder / "here"
    ((trained,),) = run_commands(steps[1:], folder)
    assert trained.exit_code == 0, trained.error
    (folder / "tab.yaml").write_text("run_dir: x\nmodel:\n\tnum_layers: 2\n")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    shutil.copytree(folder / "runs/first", folder / "runs/damaged")
    (shard,) = (folder / "runs/damaged/checkpoints/step_00000004").glob("rank_*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    return folder


def split_arguments(text):
    """Words as a reader would quote them: the braces of a YAML value stay together."""
    return [word.replace("\0", " ") for word in shlex.split(text.replace("{path: ", "{path:\0"))]


def test_the_messages_on_the_troubleshooting_page_are_real(first_run):
    shown = messages(REPOSITORY / "docs" / "troubleshooting.md")
    assert len(shown) > 15
    (outcomes,) = run_commands([split_arguments(m.arguments) for m in shown], first_run)
    hexes = re.compile(r"\b[0-9a-f]{16}\b")
    for message, found in zip(shown, outcomes, strict=True):
        assert found.exit_code >= 10, message.arguments
        assert hexes.sub("#", found.error) == hexes.sub("#", message.text), message.arguments
