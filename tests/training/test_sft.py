"""Fine-tuning on packed conversations: as Hugging Face on each alone, alike on every layout, resumed exactly, traced."""

import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from flagscale_like.data.blend import is_packed
from flagscale_like.data.chat import ChatTokenizer, parse_record
from flagscale_like.data.packing import ConversationSource
from flagscale_like.data.preprocess import preprocess, preprocess_chat
from flagscale_like.data.pretrain import build_dataset, micro_batches
from flagscale_like.data.shards import ChatOptions
from flagscale_like.families import find_family
from flagscale_like.objectives.choice import objective_of
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.reduction import NamedSum
from flagscale_like.training.metrics import read_metrics
from tests.commands import run_commands
from tests.data.chats import CHATML, make_tokenizer, write_chats
from tests.harness import build_engine, run_ranks, tiny_config, write_yaml

ROWS = 4
LAYOUTS = {
    "tp2 sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "dp2": {},
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """70 conversations and some text, with the tokenizer of both."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = make_tokenizer(folder / "tok")
    write_chats(folder / "chats.jsonl", 70)
    (folder / "text.jsonl").write_text('{"text": "two and two are four, and three are five"}\n' * 60)
    preprocess_chat([folder / "chats.jsonl"], tokenizer, folder / "chats", ChatOptions(CHATML))
    preprocess([folder / "text.jsonl"], tokenizer, folder / "text")
    return folder


def chat_config(run_dir, chats, *, names=("chats",), **changes):
    sources = [{"path": str(chats / name)} for name in names]
    data = {"sources": sources, "tokenizer": str(chats / "tok"), "split": "90,10,0"}
    changes = {"train__seq_length": 160, "model__vocab_size": 300, "train__global_batch_size": ROWS, **changes}
    return tiny_config(run_dir, data=data, **changes)


def learn(configs) -> list[list[tuple[float, float, float]]]:
    """(loss, count, gradient norm) of two steps, for each configuration."""
    return [_learn(config) for config in configs]


def _learn(config):
    train, found = config.train, []
    with parallel_context(config.parallel) as ctx:
        engine, data = build_engine(config, ctx), build_dataset(config, ctx, "train", 2 * ROWS)
        objective, batches = objective_of(config, packed=is_packed(data)), micro_batches(data, config, ctx)
        for _ in range(2):
            outputs = engine.forward_backward(batches, objective, ROWS // (train.micro_batch_size * ctx.dp))
            sums = NamedSum(ctx)({"square": outputs.grad_square, **outputs.sums})
            engine.update(clip=0.0, grad_norm=1.0)
            found.append((sums["total"] / sums["count"], sums["count"], sums["square"] ** 0.5))
    return found


def test_every_layout_and_micro_batch_size_learns_conversations_and_text_alike(chats, tmp_path):
    expected = {}
    for per in ("token", "conversation"):
        common = {"names": ("chats", "text"), "objective": {"kind": "next_token", "per": per}}
        expected[per] = (
            chat_config(tmp_path, chats, **common),
            [
                chat_config(tmp_path, chats, train__micro_batch_size=2, **common),
                *(chat_config(tmp_path, chats, parallel=layout, **common) for layout in LAYOUTS.values()),
            ],
        )
    (alone,) = run_ranks(1, learn, [config for one, others in expected.values() for config in (one, others[0])])
    layouts = [config for _, others in expected.values() for config in others[1:]]
    for found in run_ranks(2, learn, layouts):
        for number, per in enumerate(expected):
            one, two_rows = alone[2 * number : 2 * number + 2]
            assert one[0][1] == int(one[0][1])
            for other in (two_rows, *found[number * len(LAYOUTS) : (number + 1) * len(LAYOUTS)]):
                assert other == [pytest.approx(step, rel=2e-5) for step in one], per


def learn_one_row(config):
    """Of the first row: loss, count, the gradients by name, the weights by name (NumPy), and the row's conversations."""
    with parallel_context(config.parallel) as ctx:
        engine, data = build_engine(config, ctx), build_dataset(config, ctx, "train", 1)
        assert isinstance(data, ConversationSource)
        weights = {name: p.detach().numpy().copy() for name, p in engine.models[0].named_parameters()}
        objective, batches = objective_of(config, packed=True), micro_batches(data, config, ctx)
        outputs = engine.forward_backward(batches, objective, 1)
        grads = {}
        for shard in engine.owned:
            grads.setdefault(shard.name, []).append((shard.start, shard.main.grad.view(-1).numpy().copy()))
        whole = {
            name: np.concatenate([part for _, part in sorted(parts, key=lambda pair: pair[0])]).reshape(
                weights[name].shape
            )
            for name, parts in grads.items()
        }
        return float(outputs.sums["total"]), float(outputs.sums["count"]), whole, weights, data.members_of(0)


@pytest.mark.parametrize("per", ["token", "conversation"])
def test_a_pack_is_hugging_face_on_each_of_its_conversations_alone(per, chats, tmp_path):
    config = chat_config(tmp_path, chats, objective={"kind": "next_token", "per": per})
    ((total, count, grads, weights, members),) = run_ranks(1, learn_one_row, config)
    assert len(members) >= 2
    grads, weights = ({name: torch.from_numpy(x) for name, x in found.items()} for found in (grads, weights))
    family, model = find_family("llama"), config.model
    theirs = LlamaForCausalLM(LlamaConfig(**family.hf_config(model)))
    rules = family.rules(model)
    state = {n: t.clone() for r in rules for n, t in zip(r.hf, r.to_hf(weights[r.core], model), strict=True)}
    theirs.load_state_dict(state, strict=False)
    words, lines = ChatTokenizer(chats / "tok"), (chats / "chats.jsonl").read_text().splitlines()
    loss, counted = 0.0, 0
    for number in members:
        found = words.encode(parse_record(lines[number]).messages)
        ids, mask = torch.from_numpy(found.ids).long(), torch.from_numpy(found.weights)[1:]
        losses = F.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="none") * mask
        loss = loss + (losses.sum() / mask.sum() if per == "conversation" else losses.sum())
        counted += 1 if per == "conversation" else int(mask.sum())
    assert (total, count) == (pytest.approx(loss.item(), rel=1e-5), counted)
    (loss / counted).backward()
    for rule in rules:
        for name, part in zip(rule.hf, rule.to_hf(grads[rule.core], model), strict=True):
            expected = theirs.get_parameter(name).grad
            assert (part - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


def test_a_run_on_conversations_resumes_exactly_evaluates_and_leads_back_to_the_lines(chats, tmp_path):
    changes = {"train__steps": 4, "train__eval_interval": 2, "train__eval_steps": 1, "checkpoint__interval": 2}
    names = ("chats", "text")
    whole = chat_config(tmp_path / "whole", chats, names=names, **changes)
    broken = chat_config(tmp_path / "broken", chats, names=names, **changes)
    chosen = chat_config(tmp_path / "chosen", chats, names=names, **changes)
    configs = enumerate((whole, broken, chosen))
    yamls = [str(write_yaml(config, tmp_path / f"{number}.yaml")) for number, config in configs]
    (found,) = run_commands(
        [
            ["train", yamls[0]],
            ["train", yamls[1], "train.exit_at_step=2"],
            ["train", yamls[1]],
            ["data", "locate", "--run", str(tmp_path / "whole"), "--step", "3", "--json"],
            [
                "evaluate",
                "--checkpoint",
                str(tmp_path / "whole"),
                "--data",
                str(chats / "chats"),
                "--seq-length",
                "160",
            ],
        ],
        os.getcwd(),
    )
    assert [outcome.error for outcome in found] == [""] * 5
    losses = [
        [(r["lm loss"], r["grad-norm"]) for r in read_metrics(tmp_path / name) if "lm loss" in r]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    validation = [r for r in read_metrics(tmp_path / "whole") if "lm loss validation/chats" in r]
    assert len(validation) == 2
    lines = (chats / "chats.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in found[3].printed.splitlines()]
    assert {part["source"] for sample in samples for part in sample["parts"]} == {"chats", "text"}
    for sample in samples:
        assert np.isfinite(sample["loss"])
        for part in sample["parts"]:
            if part["source"] == "chats":
                first = json.loads(lines[part["line"] - 1])["messages"][0]["content"]
                assert f"user\n{first}\n" in part["text"]
    counted = sum(int(np.count_nonzero(_weights(chats, line))) for line in lines)
    assert re.search(rf"over {counted:,} tokens", found[4].printed), found[4].printed


def _weights(chats, line):
    return ChatTokenizer(chats / "tok").encode(parse_record(line).messages).weights
