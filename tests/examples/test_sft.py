"""The small example of fine-tuning: it learns its conversations by heart, and its export answers with transformers."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flagscale_like.data.chat import parse_record
from tests.commands import run_commands
from tests.harness import REPOSITORY

STEPS = 120


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    words = [
        "train",
        "examples/sft/tiny.yaml",
        f"run_dir={run_dir}",
        f"train.steps={STEPS}",
        f"checkpoint.interval={STEPS}",
    ]
    ask = ["generate", "--checkpoint", str(run_dir), "--chat", "What is a pack?"]
    (found,) = run_commands([words, ask])
    assert [outcome.error for outcome in found] == ["", ""]
    return run_dir, found[1].printed


def test_it_answers_every_question_that_it_was_trained_on(trained):
    run_dir, printed = trained
    assert printed.strip() == "Several conversations in one row that do not see each other."
    words, model = AutoTokenizer.from_pretrained(run_dir / "hf"), AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    right, asked = 0, 0
    for line in (REPOSITORY / "examples/sft/chats.jsonl").read_text().splitlines():
        messages = parse_record(line).messages
        prompt = words.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        new = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += words.decode(new, skip_special_tokens=True) == messages[-1]["content"]
        asked += 1
    assert (right, asked) == (37, 37)
    assert json.loads((run_dir / "hf/generation_config.json").read_text())["eos_token_id"] == words.eos_token_id
