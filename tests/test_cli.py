"""The command line as a user meets it."""

import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from flagscale_like import cli as command_line
from flagscale_like.cli import app
from flagscale_like.errors import DivergedError
from tests.commands import invoke, run_commands
from tests.harness import REPOSITORY, cli, run_ranks, tiny_config, write_yaml

HEAVY = ("torch", "megatron", "transformers", "numpy")


def heavy_modules(*commands: list[str]) -> str:
    """The heavy modules that a process has loaded after these commands, as a list in text."""
    code = (
        "import sys; from flagscale_like.cli import app; from typer.testing import CliRunner\n"
        f"for words in {commands}: assert CliRunner().invoke(app, words).exit_code == 0, words\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, its YAML, and what it and a second start of it did."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_yaml(tiny_config(folder / "run", train__steps=2, train__eval_interval=1), folder / "run.yaml")
    (outcomes,) = run_commands([["train", str(path)], ["train", str(path)]])
    assert [found.exit_code for found in outcomes] == [0, 0], outcomes
    return folder / "run", path, outcomes


def test_what_computes_nothing_loads_nothing_heavy(finished):
    run, path, _ = finished
    reading = [["train", str(path), "--print-config"], ["ckpt", "list", str(run)], ["report", str(run)]]
    assert heavy_modules(["--help"], *([*words, "--help"] for words in (["train"], ["ckpt"], ["data"]))) == "[]"
    assert heavy_modules(*reading, ["plan", str(path), "--cluster", "1x8xH100"]) == "[]"


def test_commands_about_data_load_no_torch(tmp_path):
    (tmp_path / "text.txt").write_text("some words of a text, and then some more words\n" * 20)
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a question", "completion": "an answer"}\n' * 4)
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    words = str(tmp_path / "words")
    chat = ["--tokenizer", f"{words}-tokenizer", "--template", str(tmp_path / "plain.jinja")]
    loaded = heavy_modules(
        ["preprocess", str(tmp_path / "text.txt"), "--train-tokenizer", "280", "--out", words],
        ["data", "inspect", words],
        ["data", "chat", str(tmp_path / "chats.jsonl"), *chat, "--out", str(tmp_path / "chats")],
    )
    assert "torch" not in loaded
    assert "megatron" not in loaded


def loaded_modules() -> list[str]:
    return sorted(sys.modules)


def test_a_rank_loads_megatron_core_without_the_compiler():
    """megatron-core asks for torch.compile while it loads; see flagscale_like/__init__.py."""
    (modules,) = run_ranks(1, loaded_modules)
    assert "megatron.core.transformer.attention" in modules
    assert "torch._inductor.compile_fx" not in modules
    assert "megatron.core.timers" in modules
    assert "wandb" not in modules  # which it loads where it is installed; see runtime/before_megatron.py


@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["preprocess"],
        ["convert", "export"],
        ["generate"],
        ["ckpt", "list"],
        ["ckpt", "verify"],
        ["doctor"],
        ["data", "locate"],
    ],
    ids=" ".join,
)
def test_every_help_ends_with_an_example(command):
    found = invoke([*command, "--help"])
    assert found.exit_code == 0
    last = " ".join(found.printed.split())
    assert "Example: flagscale-like " + command[0] in last[-200:]


def test_the_resolved_configuration_can_be_printed_and_used_again(tmp_path):
    path = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "run.yaml")
    first = invoke(["train", str(path), "train.steps=7", "--print-config"])
    assert first.exit_code == 0
    printed = yaml.safe_load(first.printed)
    assert printed["train"]["steps"] == 7
    assert printed["optimizer"]["beta2"] == 0.95
    (tmp_path / "again.yaml").write_text(first.printed)
    assert invoke(["train", str(tmp_path / "again.yaml"), "--print-config"]) == first


def test_a_dry_run_checks_a_layout_that_this_machine_does_not_have(tmp_path):
    path = write_yaml(tiny_config(tmp_path / "run"), tmp_path / "run.yaml")
    good = invoke(["train", str(path), "parallel.tp=2", "--dry-run", "--world-size", "16"])
    assert good.exit_code == 0
    assert "16 ranks = tp 2 x pp 1 x cp 1 x dp 8" in good.printed
    # In a process of its own: the exit code and the line on stderr are what a script sees.
    bad = cli("train", str(path), "parallel.tp=2", "--dry-run", "--world-size", "15")
    assert bad.returncode == 10
    assert bad.stderr.startswith("error: world size (15) must be divisible by tp*pp*cp (2*1*1)")
    assert not (tmp_path / "run").exists()


def test_train_starts_the_ranks_itself_and_they_do_what_a_launchers_ranks_do(tmp_path):
    config = tiny_config(tmp_path / "run", train__steps=2, checkpoint={"interval": 0}, parallel={"pp": 2})
    path = write_yaml(config, tmp_path / "run.yaml")
    itself = cli("train", str(path))
    assert itself.returncode == 0, itself.stderr
    assert "pp 2 vpp 1 dp 1 on 2 x CPU" in itself.stdout
    # Here the harness is the launcher; torchrun is, in tests/launch.
    (launched,), _ = run_commands([["train", str(path), f"run_dir={tmp_path / 'other'}"]], ranks=2)
    assert launched.exit_code == 0, launched.error
    assert len(_numbers(itself.stdout)) == 2
    assert _numbers(itself.stdout) == _numbers(launched.printed)


def _numbers(printed: str) -> list[list[str]]:
    """Loss, learning rate and gradient norm of every log line."""
    return [line.split(" | ")[1:4] for line in printed.splitlines() if line.startswith("step ")]


def test_a_run_leaves_what_scripts_rely_on(finished):
    run, _, (_, again) = finished
    assert {p.name for p in run.iterdir()} - {"report.html"} == {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "loss.png",
        "resilience.jsonl",
        "events.jsonl",
    }
    records = [yaml.safe_load(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "lm loss", "grad-norm", "learning-rate", "batch-size", "iteration-time"} <= records[0].keys()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "resuming from step 2" in again.printed


def test_doctor_says_what_is_there_and_what_is_missing():
    found = invoke(["doctor"])
    assert found.exit_code == 0, found.error
    lines = {line.split()[0]: line for line in found.printed.splitlines() if line.strip()}
    assert "0.16.1" in lines["megatron-core"]
    assert "without it" in lines["apex"] or "in use" in lines["apex"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DivergedError("step 3: loss nan"), 14, "step 3: loss nan"),
        (OSError(28, "No space left on device"), 15, "a file cannot be written: [Errno 28] No space left on device"),
    ],
    ids=["user error", "full disk"],
)
def test_an_error_is_printed_with_its_notes(error, code, line, monkeypatch, capsys):
    """What else went wrong while a run was closed is said after what ended the run."""
    error.add_note("while the run was closed: the plot is lost")
    codes = []
    monkeypatch.setattr(command_line, "app", lambda: (_ for _ in ()).throw(error))
    monkeypatch.setattr(command_line.os, "_exit", codes.append)
    command_line.main()
    assert codes == [code]
    assert capsys.readouterr().err == f"error: {line}\nerror: while the run was closed: the plot is lost\n"


def test_an_error_of_the_system_that_is_no_full_disk_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(command_line, "app", Path("/no/such/file").read_text)
    with pytest.raises(FileNotFoundError):
        command_line.main()


def commands_of(group, path=()):
    """(words, function) of every command."""
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for inner in group.registered_groups:
        yield from commands_of(inner.typer_instance, (*path, inner.name or inner.typer_instance.info.name))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("train x.yaml --world-size 8", "--world-size belongs to --dry-run: leave it out"),
        (
            "train x.yaml --cluster 1x8xH100 --world-size 8",
            "--world-size, --cluster belong to --dry-run: leave them out",
        ),
        ("evaluate --hf m --data x --pooling mean --split dev", "--split, --pooling belong to --retrieval"),
        ("evaluate --hf m --data x --shots 0", "--shots belongs to --tasks: leave it out"),
        ("evaluate --hf m --retrieval x --seq-length 8", "--seq-length belongs to --data"),
        ("evaluate --data x", "give either --checkpoint or --hf"),
        ("generate --checkpoint m --chat x --no-add-bos", "--add-bos belongs to --prompt"),
        ("generate --checkpoint m --prompt x --samples 2 --tp 2", "--samples, --tp belong to --batch"),
        (
            "preprocess x --train-tokenizer 300 --out o --near-threshold 0.5",
            "--near-threshold belongs to --duplicates near",
        ),
        ("data mine x --hf m --out o --key body", "--key belongs to --corpus"),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(words, line):
    found = invoke(words.split())
    assert found.exit_code == 10
    assert line in found.error


def test_every_number_on_the_command_line_has_its_bounds_in_its_type():
    """So that typer refuses what no code expects: `--train-tokenizer -3` was an OverflowError's traceback."""
    checked, without = 0, []
    for words, function in commands_of(app):
        for name, hint in get_type_hints(function, include_extras=True).items():
            option = next((m for m in getattr(hint, "__metadata__", ()) if hasattr(m, "min")), None)
            kinds = get_args(hint.__origin__) or (hint.__origin__,) if option else ()
            if {int, float} & set(kinds):
                checked += 1
                without += [f"{' '.join(words)} {name}"] if option.min is None else []
    assert without == []
    assert checked > 40
