"""What four real ranks do is what the rehearsal says they do: operation by operation, in one launch for several layouts."""

from flagscale_like.cluster import parse_cluster
from flagscale_like.recipes.pretrain import pretrain
from flagscale_like.recipes.rehearse import rehearsal_config, rehearse, rehearsed_kind
from flagscale_like.rehearsal.matching import match
from flagscale_like.rehearsal.record import RankRecord
from flagscale_like.rehearsal.recorder import Recorder
from flagscale_like.rehearsal.rehearse import group_names
from flagscale_like.runtime.parallel import parallel_context
from flagscale_like.training.parts import Part
from tests.harness import run_ranks, tiny_config

LAYOUTS = (
    {"parallel": {"tp": 2, "pp": 2, "sp": True}},
    {"parallel": {"pp": 2, "vpp": 2}, "model__num_query_groups": 4},
    {"parallel": {"cp": 2}, "train__precision": "bf16", "model__tie_embeddings": True},
)
MEETS = ("collective", "send", "receive", "wait")


class Begins(Part):
    """Marks the steps in a record."""

    def __init__(self, recorder):
        self.recorder = recorder

    def before(self, plan):
        self.recorder.begin_step()


def what(event):
    """What an event says of communication."""
    who = event.group, event.group_name, event.peer
    return event.kind, event.op, *who, event.dtype, event.shape, event.bytes, event.asynchronous, event.where


def communication(events):
    """What of a step is communication of tensors. Python objects are gathered before training alone, and not rehearsed."""
    return [what(event) for event in events if event.kind in MEETS and "all_gather_object" not in event.where]


def record_layouts(configs):
    """On a real rank: its records, one for each configuration."""
    found = []
    for config in configs:
        with parallel_context(config.parallel) as ctx:
            record = RankRecord(ctx.rank, ctx.world_size, stage=ctx.pp_rank)
            recorder = Recorder(record, device="cpu", computes=False)
            recorder.name_groups(group_names(ctx))
            with recorder:
                pretrain(config, ctx, parts=lambda engine, own=recorder: [Begins(own)])
            found.append(record)
    return found


def rehearse_layouts(configs):
    """In a process of its own, which megatron-core then knows as rehearsed: (layout, rank, communication of a step)."""
    found, cluster, cpu = [], parse_cluster("1x4xH100"), rehearsed_kind("cpu")
    for number, config in enumerate(configs):
        ranks = ",".join(str(stage * 4 // config.parallel.pp) for stage in range(config.parallel.pp))
        for one in rehearse(config, cluster, cpu, world_size=4, ranks=ranks):
            steps = [communication(one.record.step(step)) for step in (0, 1)]
            found.append((number, one.record.rank, steps))
    return found


def test_rehearsed_records_equal_those_of_four_real_ranks(tmp_path):
    configs = [tiny_config(tmp_path / str(i), **changes) for i, changes in enumerate(LAYOUTS)]
    real = run_ranks(
        4, record_layouts, [rehearsal_config(c, str(tmp_path / f"real{i}")) for i, c in enumerate(configs)]
    )
    for number in range(len(configs)):
        assert match([own[number] for own in real], step=1).problems == []
    (rehearsed,) = run_ranks(1, rehearse_layouts, configs)
    for number, rank, steps in rehearsed:
        for step, ours in enumerate(steps):
            theirs = communication(real[rank][number].step(step))
            assert len(theirs) > 20
            assert ours == theirs, (configs[number].parallel, rank, step)
    assert len(rehearsed) == sum(config.parallel.pp for config in configs)
