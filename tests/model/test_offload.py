"""Activation offload changes where activations wait, and nothing else."""

import gc
import hashlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flagscale_like.config import RunConfig
from flagscale_like.model.offload import ActivationOffload, attach_offload
from flagscale_like.planner.layout import Layout, Shape
from flagscale_like.planner.memory import waiting_share
from flagscale_like.planner.saved import layer_saves, operators_of
from flagscale_like.runtime.copies import HostPool
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms import get_platform
from tests.commands import command
from tests.harness import build_engine, run_ranks, tiny_config, train_steps, write_yaml

LAYOUTS = {
    "pp1": (1, {}),
    "pp4": (4, {"pp": 4}),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
}
MIN_BYTES = 1024


def steps(config: RunConfig, count: int = 2) -> dict:
    """Train `count` steps; digests of gradients and weights after each, and the last step's offload counts."""
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        offload = attach_offload(engine.models, config, ctx)
        digests, report, pools = [], {}, []
        for _ in range(count):
            if offload:
                offload.report()
            train_steps(engine, config, 1)
            buffers = [b for chunk in engine.chunks for b in chunk.buffers]
            digests.append(
                [
                    hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest()
                    for b in buffers
                    for t in (b.grad_data, b.param_data)
                ]
            )
            if offload:
                report = offload.report()
                pools.append((offload.pool.total_bytes, offload.pool.used_bytes))
        share = offload.share if offload else 0.0
        return {"stage": ctx.pp_rank, "digests": digests, "report": report, "pools": pools, "share": share}


def config_of(tmp_path, layout: dict, recompute: str, share=None, **changes) -> RunConfig:
    offload = {} if share is None else {"offload": {"share": share, "min_tensor_bytes": MIN_BYTES}}
    return tiny_config(tmp_path, parallel=layout, train__recompute=recompute, **offload, **changes)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_bit_identical_and_every_copy_out_comes_back(name, recompute, tmp_path):
    ranks, layout = LAYOUTS[name]
    plain = run_ranks(ranks, steps, config_of(tmp_path, layout, recompute))
    moved = run_ranks(ranks, steps, config_of(tmp_path, layout, recompute, share=1.0))
    for without, with_ in zip(plain, moved, strict=True):
        assert with_["digests"] == without["digests"]
        report = with_["report"]
        first = with_["stage"] == 0
        assert report["tensors"] > 0 or (recompute == "full" and not first)
        # A copy out is read again, or was still on the device; nothing is left in host memory after a step.
        assert report["bytes_in"] <= report["bytes_out"]
        assert report["bytes_in"] + report["reused"] > 0 or not report["tensors"]
        assert [used for _, used in with_["pools"]] == [0, 0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pp4", "pp2 vpp2"])
def test_each_stage_moves_its_share_to_within_a_tensor_a_layer(name, precision, tmp_path):
    """Bytes that the planner's table says the layers save, times the share that 1F1B leaves waiting."""
    ranks, layout = LAYOUTS[name]
    config = config_of(tmp_path, layout, "none", share="auto", train__precision=precision)
    planned = Layout.of(config, ranks)
    shape, size = Shape.of(config.model), 2 if precision == "bf16" else 4
    saves = layer_saves(shape, planned, config.train.seq_length, size, operators_of(config.kernels, cuda=False))
    layer = sum(s.bytes for s in saves if s.bytes >= MIN_BYTES)
    layers_run = 4 // (planned.pp) * planned.num_microbatches
    largest = max(s.bytes for s in saves)
    for found in run_ranks(ranks, steps, config):
        stage = found["stage"]
        assert found["share"] == pytest.approx(waiting_share(planned, stage))
        wanted = found["share"] * layer * layers_run
        slack = largest * layers_run + (8192 * layers_run)  # a stage's input and the norms' rows stay
        assert abs(found["report"]["bytes_out"] - wanted) <= (slack if found["share"] else 0)
        if found["share"]:
            assert found["report"]["bytes_out"] > 0.5 * wanted


def test_most_copies_in_are_started_before_they_are_needed(tmp_path):
    for name in ("pp4", "pp2 vpp2"):
        ranks, layout = LAYOUTS[name]
        config = config_of(tmp_path, layout, "none", share=1.0, train__global_batch_size=16, model__num_layers=8)
        report = run_ranks(ranks, steps, config)[0]["report"]
        assert report["prefetched"] > 0.9 * (report["prefetched"] + report["late"])


def test_no_step_leaves_host_memory_behind(tmp_path):
    """The pool has its size after the second step, and nothing in it is in use between steps."""
    changes = {"train__seq_length": 16, "train__global_batch_size": 4, "model__hidden_size": 32}
    config = config_of(tmp_path, {"pp": 2}, "none", share=1.0, **changes)
    for found in run_ranks(2, steps, config, 10):
        assert found["report"]["tensors"] > 0
        totals = [total for total, _ in found["pools"]]
        assert totals[1:] == totals[1:2] * 9
        assert not any(used for _, used in found["pools"])


def test_share_lists_must_name_every_stage(tmp_path):
    file = tmp_path / "x.yaml"
    config = tiny_config(tmp_path / "run", parallel={"pp": 2}, offload={"share": [0.5, 0.0]})
    write_yaml(config, file)
    done = command("train", str(file), "--dry-run", "offload.share=[0.5]")
    assert done.returncode == 10
    assert "offload.share lists 1 stages, parallel.pp is 2: give one share for each stage" in done.stderr
    done = command("train", str(file), "--dry-run", "offload.share=some")
    assert done.stderr.count("\n") == 1
    assert (
        "share must be auto, a number from 0 to 1, or a list of one number for each stage (got 'some')" in done.stderr
    )
    done = command("train", str(file), "--dry-run", "offload.share=1.5")
    assert "share (1.5) must be between 0 and 1, or auto" in done.stderr


# ------------------------------------------------------------------------------------------ the traps, one test each


class Block(nn.Module):
    """As much of a TransformerBlock as offload looks at."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.final_layernorm, self.input_tensor = None, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Recompute:
    """The part of a TransformerConfig that offload reads."""

    recompute_granularity, recompute_modules = None, None


def offloaded(*layers: nn.Module, share: float = 1.0) -> tuple[Block, ActivationOffload]:
    block, offload = Block(*layers), ActivationOffload(get_platform(), share=share, min_tensor_bytes=64)
    offload.attach(block, Recompute())
    return block, offload


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def run(block: Block, x: torch.Tensor) -> torch.Tensor:
    """x's gradient through the block."""
    x = x.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None
    return x.grad


X = torch.linspace(-1, 1, 512).view(16, 32)


def test_parameters_and_views_of_their_buffers_stay():
    linear = nn.Linear(32, 32, bias=False)
    weight_view = linear.weight.detach().view(-1)[:512].view(16, 32)
    block, offload = offloaded(linear, Function(lambda x: x * weight_view.requires_grad_()))
    block.layers[1].weight = linear.weight  # one buffer, two views, as DDP lays parameters out
    run(block, X)
    saved = offload.stats.bytes_out
    assert saved == 2 * X.nbytes  # both inputs; neither the weight nor the view of it


def test_what_several_layers_save_is_found_out_and_stays():
    table = torch.rand(16, 32)
    block, offload = offloaded(*[Function(lambda x: x * table) for _ in range(3)])
    run(block, X)
    first = offload.report()["tensors"]
    run(block, X)
    assert first == 1  # the first layer could not know
    assert offload.report()["tensors"] == 0


def test_two_views_of_the_same_bytes_are_moved_once_and_keep_their_shapes():
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.view(-1), x.t())
            return x * 2

        @staticmethod
        def backward(ctx, *grads):
            seen.extend((t.shape, t.stride(), t.clone()) for t in ctx.saved_tensors)
            return grads[0] * 2

    block, offload = offloaded(Function(lambda x: Twice.apply(x * 1.0)), *[Function(torch.neg)] * 3)
    run(block, X)
    assert offload.stats.tensors == 1
    assert offload.stats.bytes_in == offload.stats.bytes_out == X.nbytes
    assert [(tuple(shape), stride) for shape, stride, _ in seen] == [
        ((16, 32), (32, 1)),
        ((512,), (1,)),
        ((32, 16), (1, 32)),
    ]
    assert torch.equal(seen[0][2], X)
    assert torch.equal(seen[2][2], X.t())


def test_a_strided_view_is_copied_without_the_rest_of_its_storage():
    block, offload = offloaded(Function(lambda x: x.repeat(1, 3)[:, 32:64].sin().repeat(1, 2)[:, ::2].cos()))
    grad = run(block, X)
    assert offload.stats.bytes_out == 2 * X.nbytes
    plain = X.clone().requires_grad_()
    plain.repeat(1, 3)[:, 32:64].sin().repeat(1, 2)[:, ::2].cos().sum().backward()
    assert plain.grad is not None
    assert torch.equal(grad, plain.grad)


def test_an_output_may_be_emptied_after_it_was_saved():
    """The pipeline schedule sets out.data to one element once it is sent."""
    block, offload = offloaded(Function(torch.exp), Function(torch.exp), Function(torch.exp))
    x = (X / 4).requires_grad_()
    out = block(x)
    out.data = torch.empty(1)
    torch.autograd.Variable._execution_engine.run_backward(
        (out,), (torch.ones_like(X),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    reference = (X / 4).requires_grad_()
    reference.exp().exp().exp().sum().backward()
    assert x.grad is not None
    assert reference.grad is not None
    assert torch.equal(x.grad, reference.grad)
    assert offload.stats.bytes_out == 3 * X.nbytes


def test_the_blocks_output_is_no_view():
    """The schedule asserts it, and identity autograd functions or full backward hooks would break it."""
    block, _ = offloaded(Function(torch.exp))
    assert block(X.clone().requires_grad_())._base is None


def test_checkpoint_without_output_is_refused():
    config = Recompute()
    config.recompute_granularity, config.recompute_modules = "selective", ["core_attn", "layernorm"]
    with pytest.raises(AssertionError, match="layernorm"):
        ActivationOffload(get_platform(), share=1.0, min_tensor_bytes=64).attach(Block(), config)


class CheckpointedBlock(Block):
    """Recomputes its layers in the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


def test_layers_that_run_inside_the_backward_pass_are_not_offloaded():
    offload = ActivationOffload(get_platform(), share=1.0, min_tensor_bytes=64)
    block = CheckpointedBlock(Function(lambda x: x.sin().cos()))
    offload.attach(block, Recompute())
    grad = run(block, X)
    assert offload.stats.tensors == 1  # the checkpoint's input, not what sin and cos save when they run again
    assert torch.equal(grad, run(Block(*block.layers), X))


def test_1f1b_prefetches_the_oldest_micro_batch_next():
    block, offload = offloaded(*[Function(torch.exp) for _ in range(4)])
    waiting = []
    for k in range(8):
        x = (X / 8 + k / 100).requires_grad_()
        waiting.append(block(x).sum())
        if len(waiting) == 4:
            waiting.pop(0).backward()
    for loss in waiting:
        loss.backward()
    report = offload.report()
    assert report["late"] == 1 * 1  # the first layer of the first backward pass alone
    assert report["prefetched"] + report["late"] + report["reused"] == report["tensors"] == 32


def test_any_order_of_backward_passes_is_learnt_in_a_step():
    block, offload = offloaded(*[Function(torch.exp) for _ in range(4)])
    lates = []
    for _ in range(2):
        outs = [block((X / 8 + k / 100).requires_grad_()).sum() for k in range(6)]
        for index in (2, 3, 0, 1, 5, 4):
            outs[index].backward()
        del outs
        lates.append(offload.report()["late"])
    assert lates[1] <= 1 < lates[0]


def test_earlier_layers_move_first():
    def exp_of_rows(rows):
        return Function(lambda x: torch.cat([x[:rows].exp(), x[rows:]]))

    block, offload = offloaded(*[exp_of_rows(rows) for rows in (1, 2, 4, 8)], share=0.5)
    run(block, X)
    row = X[0].nbytes
    assert (offload.stats.bytes_out, offload.stats.bytes_kept) == ((1 + 2) * row, (4 + 8) * row)


def test_evaluation_moves_nothing():
    block, offload = offloaded(Function(torch.exp))
    with torch.no_grad():
        block(X)
    assert offload.stats.tensors == 0


def test_buffers_are_used_again_and_come_back_when_a_graph_is_dropped():
    block, offload = offloaded(*[Function(torch.exp) for _ in range(3)])
    for _ in range(5):
        out = block(X.clone().requires_grad_())
        assert offload.pool.used_bytes > 0
        del out
        gc.collect()
        assert offload.pool.used_bytes == 0
    assert offload.pool.total_bytes == 3 * 4096


def test_the_pool_hands_a_buffer_back_with_its_last_readers_ticket():
    pool = HostPool(get_platform())
    buffer, ticket = pool.get(5000)
    assert (buffer.numel(), ticket) == (8192, None)
    pool.put(buffer, "copy 7")
    again, ticket = pool.get(4097)
    assert again is buffer
    assert ticket == "copy 7"


def test_pinned_buffers_are_cut_from_slabs():
    pool = HostPool(get_platform(), slab_bytes=1 << 16)
    buffers = [pool.get(12288)[0] for _ in range(6)]
    assert pool.total_bytes == 2 << 16  # five of 12 KiB fit 64 KiB
    assert len({b.data_ptr() for b in buffers}) == 6
    assert len({b.untyped_storage().data_ptr() for b in buffers}) == 2
    large, _ = pool.get(100_000)
    assert large.numel() == 102_400
    assert pool.total_bytes == (2 << 16) + (1 << 17)
