"""Parameters that are gathered while the chunk before runs: the same losses, to the bit, as without overlap."""

from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.runtime.platforms.cpu import CpuPlatform
from tests.harness import build_engine, run_ranks, tiny_config, train_steps


def losses(config, gathers):
    CpuPlatform.overlaps_param_gather = gathers
    with parallel_context(config.parallel) as ctx:
        engine = build_engine(config, ctx)
        found = train_steps(engine, config, 3)
        return found, engine.chunks[0].ddp_config.align_param_gather


def both(config):
    return losses(config, False), losses(config, True)


def test_chunks_whose_parameters_are_gathered_ahead_learn_the_same(tmp_path):
    config = tiny_config(tmp_path, parallel={"pp": 2, "vpp": 2}, train__global_batch_size=4)
    for (plain, ahead), (overlapped, is_ahead) in run_ranks(4, both, config):
        assert (ahead, is_ahead) == (False, True)
        assert overlapped == plain
