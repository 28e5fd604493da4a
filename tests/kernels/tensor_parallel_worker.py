"""What each of four gloo processes does for test_cross_entropy.py: its shard against the whole vocabulary."""

import itertools
import os
import sys
from typing import Any

import interpreter_fixes
import torch
import torch.distributed as dist
from kernel_checks import seeded

from flagscale_kernels import cross_entropy, fused_linear_cross_entropy, linear_cross_entropy_reference

S, B, H, V = 8, 2, 16, 246
RANKS = 4
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}


def check_cross_entropy(group, backend, dtype):
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    logits, dloss = seeded(S, B, V, dtype=dtype), seeded(S, B, seed=2)
    target = torch.randint(0, V, (S, B), generator=torch.Generator().manual_seed(1))
    target[0, 0] = -100
    whole = logits.clone().requires_grad_()
    expected = cross_entropy(whole, target, reduction="none", backend="torch", **OPTIONS)
    expected.backward(dloss)
    columns = slice(rank * V // size, (rank + 1) * V // size)
    shard = logits[..., columns].contiguous().requires_grad_()
    loss = cross_entropy(shard * 1, target, group=group, reduction="none", backend=backend, **OPTIONS)
    loss.backward(dloss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(shard.grad, whole.grad[..., columns])


def check_linear(group, backend, sequence_parallel, vocab_size, padded):
    """`padded` rows of weight over all ranks; those from vocab_size on hold nan, which shows if anything reads them."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    hidden, weight, dloss = seeded(S, B, H), seeded(padded, H, seed=1), seeded(S, B, seed=2)
    weight[vocab_size:] = torch.nan
    target = torch.randint(0, vocab_size, (S, B), generator=torch.Generator().manual_seed(3))
    target[1, 1], target[2, 0], target[2, 1] = -100, 0, vocab_size - 1
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = linear_cross_entropy_reference(whole_hidden, whole_weight, target, vocab_size=vocab_size, **OPTIONS)
    expected.backward(dloss)
    rows = slice(rank * padded // size, (rank + 1) * padded // size)
    tokens = slice(rank * S // size, (rank + 1) * S // size) if sequence_parallel else slice(None)
    my_hidden, my_weight = hidden[tokens].clone().requires_grad_(), weight[rows].clone().requires_grad_()
    my_weight.main_grad = torch.ones_like(my_weight)
    for accumulate_main_grad in (True, False):
        loss = fused_linear_cross_entropy(
            my_hidden, my_weight, target, group=group, sequence_parallel=sequence_parallel, chunk_tokens=5,
            vocab_size=vocab_size, reduction="none", backend=backend, accumulate_main_grad=accumulate_main_grad,
            **OPTIONS,
        )  # fmt: skip
        my_hidden.grad = my_weight.grad = None
        loss.backward(dloss)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(my_hidden.grad, whole_hidden.grad[tokens])
    torch.testing.assert_close(my_weight.grad, whole_weight.grad[rows])
    torch.testing.assert_close(my_weight.main_grad, 1 + whole_weight.grad[rows])
    padding = my_weight.grad[max(0, vocab_size - rows.start) :]
    assert torch.equal(padding, torch.zeros_like(padding))


def check_one_collective(group):
    calls = []
    names = ["all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"]
    stock = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, lambda *args, name=name, **kwargs: calls.append(name) or stock[name](*args, **kwargs))
    logits = seeded(4, 8).requires_grad_()
    cross_entropy(logits, torch.zeros(4, dtype=torch.int64), group=group, **OPTIONS).backward()
    for name in names:
        setattr(dist, name, stock[name])
    assert calls == ["all_gather_into_tensor"], calls


def main(rank, address):
    interpreter_fixes.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    pair = dist.new_group([2, 3])  # their ranks in this group differ from their ranks in the world
    for backend in ("triton", "torch"):
        if rank in (2, 3):
            for dtype in (torch.float32, torch.bfloat16):
                check_cross_entropy(pair, backend, dtype)
            for sequence_parallel, (vocab_size, padded) in itertools.product((False, True), ((246, 246), (250, 256))):
                check_linear(pair, backend, sequence_parallel, vocab_size, padded)
        for sequence_parallel in (False, True):  # 128 rows a rank: two tokens on rank 1, padding alone on ranks 2 and 3
            check_linear(dist.group.WORLD, backend, sequence_parallel, 130, 512)
    check_one_collective(dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    main(int(sys.argv[1]), sys.argv[2])
