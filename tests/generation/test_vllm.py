"""VllmEngine against a stand-in of vLLM's interface: whole weights from any layout, the check of them, versions, texts."""

import hashlib
import sys

import pytest
import torch

from flagscale_like.config import Parallel
from flagscale_like.engine.engine import Engine
from flagscale_like.errors import CheckpointError, ConfigError, DataError, PlatformError
from flagscale_like.generation import vllm
from flagscale_like.generation.hf_weights import WeightSpec, hf_weights, weight_specs
from flagscale_like.generation.manifest import checked_weights
from flagscale_like.generation.rollout import Prompt, Sampling
from flagscale_like.generation.vllm import VllmEngine, open_llm
from flagscale_like.model.spec import ModelSpec
from flagscale_like.runtime.parallel import ParallelContext, parallel_context
from tests.generation import vllm_stand_in
from tests.harness import run_ranks, tiny_config

PROMPTS = [Prompt([1, 2, 3], number=7, samples=2), Prompt([4] * 9, number=8)]


MIXTURE = {"model__family": "mixtral", "model__experts": {"count": 4, "top_k": 2, "ffn_hidden_size": 96}}


def digests(weights):
    return {
        name: (tuple(t.shape), hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).hexdigest())
        for name, t in weights.items()
    }


def draw(engine, sampling):
    return [
        (r.prompt, r.sample, tuple(r.ids), tuple(r.logprobs), r.finish, r.version)
        for r in engine.generate(PROMPTS, sampling)
    ]


def hand_over(layouts, experts):
    """On each layout: what vLLM's stand-in holds, the calls it got, and what it draws; trained weights with an optimizer."""
    vllm_stand_in.install()
    vllm.BUCKET_BYTES = 40_000
    found = []
    for layout in layouts:
        changes = {"parallel": layout}
        if experts:
            changes |= MIXTURE
        config = tiny_config("x", model__tie_embeddings=not experts, **changes)
        with parallel_context(Parallel(**layout)) as ctx:
            spec = ModelSpec.of(config)
            engine = Engine.build(spec, ctx, optimizer=config.optimizer)
            llm = open_llm("folder", room=16, dtype=torch.float32, memory=0.4)
            generator = VllmEngine(llm, spec.arch, ctx, dtype=torch.float32, room=16)
            problems = []
            for act in (lambda g=generator: g.generate(PROMPTS, Sampling(4)), generator.wake):
                try:
                    act()
                except ConfigError as error:
                    problems.append(str(error))
            generator.load(hf_weights(engine, torch.float32), version=3)
            texts = draw(generator, Sampling(8, stop=(5, 6), seed=1))
            held = digests(llm.weights)
            generator.sleep()
            for act in (generator.wake, lambda g=generator: g.generate(PROMPTS, Sampling(4))):
                try:
                    act()
                except ConfigError as error:
                    problems.append(str(error))
            generator.load(hf_weights(engine, torch.float32), version=4)
            generator.wake()
            again = draw(generator, Sampling(8, stop=(5, 6), seed=1))
            found.append((held, texts, again, llm.calls, llm.options, problems))
    return found


def test_weights_arrive_whole_from_every_layout():
    ((held, texts, again, calls, options, problems),) = run_ranks(1, hand_over, [{}], False)[0]
    specs = weight_specs(tiny_config("x", model__tie_embeddings=True).model, torch.float32)
    assert list(held) == [spec.name for spec in specs]
    assert [shape for shape, _ in held.values()] == [spec.shape for spec in specs]
    assert options["load_format"] == "dummy"
    assert options["weight_transfer_config"].backend == "ipc"
    once = ["start", *["update"] * calls[2:].index("finish"), "finish", "reset"]
    assert calls[2] == "update"
    assert calls[:1] + calls[1 : 1 + len(once)] == ["init", *once]
    assert once.count("update") > 2  # buckets
    assert calls[1 + len(once) :] == ["sleep 2", "wake weights", *once, "wake kv_cache"]
    assert len(problems) == 3  # before the first load(), and asleep without weights
    assert [(p, s, version) for p, s, *_, version in texts] == [(7, 0, 3), (7, 1, 3), (8, 0, 3)]
    assert [text[:-1] for text in texts] == [text[:-1] for text in again]
    assert {text[-1] for text in again} == {4}
    assert all(logprobs == tuple(-float(t) for t in ids) for _, _, ids, logprobs, *_ in texts)
    assert len(texts[2][2]) <= 16 - 9  # the room
    ranks = run_ranks(2, hand_over, [{"tp": 2}, {"pp": 2}, {}], False)
    for own in ranks:
        assert all(one[0] == held for one in own)  # bit-equal, on every rank
        assert all([t[:-1] for t in one[1]] == [t[:-1] for t in texts] for one in own[:2])


def test_experts_arrive_one_by_one():
    held = run_ranks(1, hand_over, [{}], True)[0][0][0]
    names = weight_specs(tiny_config("x", **MIXTURE).model, torch.float32)
    assert list(held) == [spec.name for spec in names]
    for own in run_ranks(2, hand_over, [{"ep": 2}], True):
        assert own[0][0] == held


SPECS = [WeightSpec("a", (2,), torch.float32), WeightSpec("b", (3,), torch.bfloat16)]
A, B = ("a", torch.zeros(2)), ("b", torch.zeros(3))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([A], "1 of 2 tensors are missing, such as b"),
        ([A, A], "a comes twice"),
        ([A, ("c", torch.zeros(3))], "c is not known"),
        ([("a", torch.zeros(3))], r"a has the shape \(3,\), the model's is \(2,\)"),
        ([B, A], "b comes where a is announced"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(weights, words):
    with pytest.raises(CheckpointError, match=words):
        list(checked_weights(iter(weights), SPECS))
    assert [t.dtype for _, t in checked_weights([A, B], SPECS)] == [torch.float32, torch.bfloat16]


class Alone(ParallelContext):
    """A world of one, without torch.distributed."""

    rank = dp_rank = 0

    def __init__(self): ...

    def gather(self, value):
        return [value]


@pytest.fixture
def stand_in(monkeypatch):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}
    vllm_stand_in.install()
    yield vllm_stand_in
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]
    sys.modules.update(before)


def test_what_vllm_cannot_do_is_refused(stand_in):
    arch = tiny_config("x").model
    llm = open_llm("folder", room=16, dtype=torch.float32, memory=0.4)
    engine = VllmEngine(llm, arch, Alone(), dtype=torch.float32, room=16)
    with pytest.raises(CheckpointError, match="is not known"):
        engine.load([("x", torch.zeros(1))], 1)
    with pytest.raises(ConfigError, match="no whole weights"):
        engine.generate(PROMPTS, Sampling(2))
    engine.load([(s.name, torch.zeros(s.shape)) for s in weight_specs(arch, torch.float32)], 1)
    with pytest.raises(ConfigError, match="top_p 1 and top_k 0, or engine own"):
        engine.generate(PROMPTS, Sampling(2, top_k=3))
    with pytest.raises(ConfigError, match="prompt 1 has 16 tokens: 1 to 15 fit"):
        engine.generate([Prompt([1] * 16, 1)], Sampling(2))
    llm.finish_reason = "abort"
    with pytest.raises(DataError, match="gave up a text of prompt 7: finish_reason is 'abort'"):
        engine.generate(PROMPTS, Sampling(2))
    stand_in.install("0.20.2")
    with pytest.raises(PlatformError, match=r"vLLM 0.20.2 is installed.*install 0.32 or later"):
        open_llm("folder", room=16, dtype=torch.float32, memory=0.4)


def test_without_vllm_the_extra_is_named():
    with pytest.raises(PlatformError, match=r"flagscale_like\[vllm\]"):
        open_llm("folder", room=16, dtype=torch.float32, memory=0.4)
