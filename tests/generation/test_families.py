"""The likeliest text of every family's model, token by token that of transformers."""

import pytest
import torch
import transformers

from flagscale_like.checkpoint.hf_folder import HfFolder
from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.generation.engine import OwnEngine
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import parallel_context
from tests.families import tiny
from tests.harness import run_ranks

COUNT = 12
PROMPTS = [tiny.ids()[0, :n].tolist() for n in (9, 2, 14)]


def texts_of(folders):
    found = {}
    for name, folder in folders.items():
        with parallel_context(Parallel()) as ctx:
            source = HfFolder(folder)
            own = OwnEngine(Engine.build(ModelSpec(arch=source.arch, seq_length=32), ctx, source=source))
            asked = [Prompt(prompt, number) for number, prompt in enumerate(PROMPTS)]
            found[name] = {r.prompt: r.ids for r in own.generate(asked, Sampling(COUNT, temperature=0))}
    return found


@pytest.mark.filterwarnings("ignore")
def test_greedy_texts_are_those_of_transformers(tmp_path):
    folders = {name: tiny.make(name, tmp_path) for name in tiny.SHIPPED}
    (ours,) = run_ranks(1, texts_of, folders)
    wrong, texts = [], set()
    for name, folder in folders.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for number, prompt in enumerate(PROMPTS):
            options = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            theirs = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            texts.add(tuple(theirs))
            if ours[name][number] != theirs:
                wrong.append((name, number))
    assert not wrong
    assert len(texts) > len(folders)
