"""`generate --adapter`: a LoRA run's adapters beside a Hugging Face folder, against the merged model and peft."""

import json
from pathlib import Path

import peft
import torch
import transformers

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.data.tokenizer import Tokenizer
from tests import faults
from tests.commands import run_commands
from tests.generation.folders import make_folder
from tests.harness import run_ranks, tiny_config

NEW, PROMPTS = 16, ("a line of", "yes, and one more")


@torch.no_grad()
def texts_of_peft(base, adapter):
    """What transformers and peft make of the prompts, token by token, with the likeliest one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model, tokenizer, found = peft.PeftModel.from_pretrained(model, adapter).eval(), Tokenizer(base), []
    for prompt in PROMPTS:
        ids = tokenizer.encode_batch([prompt])[0]
        drawn = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0].tolist()[
            len(ids) :
        ]
        found.append(
            prompt + tokenizer.decode(drawn[: drawn.index(tokenizer.eod)] if tokenizer.eod in drawn else drawn)
        )
    return found


def test_a_text_of_adapters_is_that_of_the_merged_model_and_of_peft(tmp_path):
    base = make_folder(tmp_path / "base")
    config = tiny_config(
        tmp_path / "run",
        model=HfFolder(base).arch.model_dump(),
        lora={"rank": 4, "alpha": 16},
        checkpoint__init_from_hf=str(base),
        train__steps=3,
        optimizer__lr=0.05,
    )
    run_ranks(1, faults.train_run, config)
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def text_of(*model, prompt=PROMPTS[0]):
        return [
            "generate",
            "--checkpoint",
            *model,
            "--prompt",
            prompt,
            "--max-new-tokens",
            str(NEW),
            "--tokenizer",
            "base",
        ]

    ((*exports, plain, beside, named, merged, second, batch),) = run_commands(
        [
            ["convert", "export", "--checkpoint", "run", "--out", "adapter", "--adapter", "--dtype", "fp32"],
            ["convert", "export", "--checkpoint", "run", "--out", "merged", "--merge", "--dtype", "fp32"],
            text_of("base"),
            text_of("base", "--adapter", "adapter"),
            text_of("base", "--adapter", "run"),
            text_of("merged"),
            text_of("base", "--adapter", "run", prompt=PROMPTS[1]),
            ["generate", "--checkpoint", "base", "--adapter", "run", "--batch", "prompts.jsonl", "--out", "out.jsonl",
             "--max-new-tokens", str(NEW), "--tokenizer", "base"],
        ],
        tmp_path,
    )  # fmt: skip
    for outcome in (*exports, plain, beside, named, merged, second, batch):
        assert outcome.exit_code == 0, outcome.error
    found = [named.printed.rstrip("\n"), second.printed.rstrip("\n")]
    assert plain.printed != named.printed
    assert named.printed == merged.printed
    said, text = beside.printed.split("\n", 1)
    assert "peft records no identity of the base" in said
    assert text == named.printed
    assert found == texts_of_peft(base, tmp_path / "adapter")
    answers = [json.loads(line) for line in Path(tmp_path / "out.jsonl").read_text().splitlines()]
    by_number = {answer["number"]: answer["completion"] for answer in answers}
    assert [prompt + by_number[number] for number, prompt in enumerate(PROMPTS)] == found
