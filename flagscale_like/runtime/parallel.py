"""ParallelContext: this rank's place in the tp/cp/dp/pp grid, and its process groups. Starts and stops torch.distributed."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from flagscale_like.config import Parallel
from flagscale_like.errors import ConfigError, DataError, PeerLostError, PlatformError, UserError
from flagscale_like.runtime import device_shim
from flagscale_like.runtime.bridge import Bridge
from flagscale_like.runtime.launched import Launch, current_launch
from flagscale_like.runtime.platforms import Platform, get_platform
from flagscale_like.runtime.row_cut import RowCut, row_cut

T = TypeVar("T")

# What gloo and NCCL say of a rank that is gone.
PEER_LOST = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Connection refused|remote process exited")


@dataclass(frozen=True)
class ParallelContext:
    """Degrees, ranks and groups of one rank. Ranks are laid out tp fastest, then cp, dp, pp (megatron-core's default).

    Attributes:
        layout: the configured degrees.
        dp: data-parallel degree.
        local_rank: among the ranks of this node.
        groups: megatron-core's process groups.
        bridge: to the other world of the launch, where it has two.
    """

    platform: Platform
    layout: Parallel
    dp: int
    rank: int
    world_size: int
    local_rank: int
    groups: ProcessGroupCollection
    bridge: Bridge | None = None

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, dp * cp: each owns a part of their gradients and optimizer states."""
        return self.groups.dp_cp.size()

    @property
    def replica_rank(self) -> int:
        """This rank among the replicas."""
        return self.groups.dp_cp.rank()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    def replicas_of(self, *, expert: bool) -> tuple[int, int]:
        """How many ranks hold the same part of a parameter, and which of them this one is.

        Args:
            expert: it is an expert's. Its copies lie on the ranks that ep leaves of tp * cp * dp.
        """
        group = self.replica_group(expert=expert)
        return group.size(), group.rank()

    def replica_group(self, *, expert: bool) -> dist.ProcessGroup:
        """The ranks of `replicas_of`."""
        return self.groups.expt_dp if expert else self.groups.dp_cp

    @property
    def row_cut(self) -> RowCut | None:
        """How rows lie over the context-parallel ranks; None where each rank holds whole rows."""
        return row_cut(self.groups.cp, self.layout.cp_kind)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return is_pp_last_stage(self.groups.pp)

    @property
    def is_main(self) -> bool:
        """The one rank that writes logs and shared files."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """The one rank of each node that prepares what the node's ranks share."""
        return self.local_rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks (float64)."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.platform.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """`value` of rank 0, on every rank. Any picklable object."""
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.platform.device)
        return box[0]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank. Any picklable object."""
        return self.broadcast(work() if self.is_main else None)

    def add_up(self, numbers: Tensor, names: Sequence[str]) -> list[float]:
        """The sums over all ranks of a float64 vector on the device, for which the host waits.

        Args:
            names: of the numbers.
        """
        dist.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, value: object) -> list:
        """Every rank's `value`, on every rank."""
        values: list = [None] * self.world_size
        self.platform.all_gather_object(values, value)
        return values

    @property
    def speaks(self) -> bool:
        """The one of the ranks that share a model and its micro-batches that says what was found: on the last stage."""
        return self.tp_rank == 0 and self.cp_rank == 0 and self.is_last_stage

    def gather_models(self, value: object) -> list:
        """`value` of each data-parallel rank's model, as the rank that speaks for it has it, on every rank."""
        return [found for spoke, found in self.gather((self.speaks, value if self.speaks else None)) if spoke]

    def gather_to_main(self, value: object) -> list:
        """Every rank's `value`, on rank 0; an empty list on the others. For what grows with the number of ranks."""
        values: list = [None] * self.world_size if self.is_main else []
        dist.gather_object(value, values if self.is_main else None, 0)
        return values


def whole_on_each_rank(ctx: ParallelContext) -> ParallelContext:
    """The same ranks with another layout beside ctx's: each holds a whole model. All ranks call it."""
    own = dist.new_group([ctx.rank], use_local_synchronization=True)
    names = {field.name for field in dataclasses.fields(ProcessGroupCollection)}
    replicas = {"dp", "dp_cp", "tp_dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp", "intra_dist_opt"} & names
    alone = dict.fromkeys(names - replicas, own) | {"hcp": [own]}
    groups = ProcessGroupCollection(**alone, **dict.fromkeys(replicas, dist.group.WORLD))
    return dataclasses.replace(ctx, layout=Parallel(), dp=ctx.world_size, groups=groups)


def agree(ctx: ParallelContext, work: Callable[[], T]) -> T:
    """Run something on every rank; if it fails on one, all raise its error, and none is left waiting in a collective.

    Returns:
        This rank's result.

    Raises:
        UserError: on every rank, the one that `work` raised on any; a DataError where it was an OSError.
    """
    problem: tuple[type[UserError], str] | None = None
    result: Any = None
    try:
        result = work()
    except UserError as error:
        problem = (type(error), str(error))
    except OSError as error:
        problem = (DataError, str(error))
    for kind, text in filter(None, ctx.gather(problem)):
        raise kind(text)
    return result


def agree_on_a_launch(store: dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """A name for this launch of the ranks: rank 0 makes it up, and every other rank confirms it.

    torchrun keeps one store over its restarts, and a launch would find the addresses of dead ranks in it. The keys of a
    launch therefore begin with its name. torchrun's restart count cannot be that name, because each node's agent counts its
    own restarts only. Keys that dead ranks left in the store do no harm here: rank 0 answers them, and nobody confirms.

    Raises:
        PlatformError: a rank did not come.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"meet/{rank}", mine)
        name = store.get(f"meet/{mine}").decode()  # waits for rank 0
        store.set(f"meet/{name}/{rank}", "here")
        return name
    missing, give_up = set(range(1, world)), time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if store.check([f"meet/{other}"]):
                store.set(f"meet/{store.get(f'meet/{other}').decode()}", mine)
                if store.check([f"meet/{mine}/{other}"]):
                    missing.discard(other)
        if missing and time.monotonic() > give_up:
            raise PlatformError(f"ranks {sorted(missing)} of {world} did not come within {timeout_s:.0f} s")
        time.sleep(0.01)
    return mine


def _meet(platform: Platform, launch: Launch | None, timeout_s: float, apart: int) -> tuple[int, Bridge | None]:
    """Start torch.distributed: with the other ranks at torchrun's address, or alone.

    Args:
        apart: ranks, the last ones, that form a world of their own.

    Returns:
        The size of this rank's world, and the bridge to the other one where there are two.

    Raises:
        PlatformError: the port is taken, or nobody answers there.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    start = functools.partial(
        dist.init_process_group, platform.backend, timeout=timeout, device_id=platform.group_device
    )
    if launch is None:
        start(store=dist.HashStore(), rank=0, world_size=1)
        return 1, None
    launch.check_address()
    try:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        store, bridge = dist.PrefixStore(agree_on_a_launch(store, rank, world, timeout_s), store), None
        if apart:
            bridge = Bridge(dist.PrefixStore("bridge", store), rank, world, apart, timeout_s)
            store = dist.PrefixStore("apart" if bridge.is_apart else "together", store)
            rank, world = bridge.world
        start(store=store, rank=rank, world_size=world)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        cause = "the port is taken: choose another --master-port" if "EADDRINUSE" in str(error) else "no answer"
        raise PlatformError(
            f"the ranks cannot meet at {launch.endpoint}: {cause} ({str(error).splitlines()[0]})"
        ) from None
    return world, bridge


@contextmanager
def parallel_context(
    layout: Parallel, *, seed: int = 1234, timeout_s: float = 1800.0, alone: bool = False, apart: int = 0
) -> Iterator[ParallelContext]:
    """Start torch.distributed and the model-parallel groups, and stop them at the end.

    Under torchrun the ranks meet at its address; without it, this process is a world of one.

    Args:
        seed: of the model-parallel random streams (dropout).
        timeout_s: after this long in one collective a rank gives up.
        alone: be a world of one under torchrun as well.
        apart: so many of the launch's ranks, the last ones, are a world of their own, beyond the context's bridge.

    Raises:
        ConfigError: the world size is no multiple of tp * pp * cp.
        PlatformError: the ranks cannot meet: the port is taken, or nobody answers there.
        PeerLostError: another rank ended inside the `with` block.
    """
    launch = None if alone else current_launch()
    world = launch.world_size if launch else 1
    if apart and not 0 < apart < world:
        raise ConfigError(
            f"{apart} of {world} ranks are to be a world of their own: leave at least {layout.smallest_world} for the rest"
        )
    if world % layout.smallest_world or apart % layout.smallest_world:
        size = f"{world - apart} + {apart}" if apart else world
        raise ConfigError(
            f"world size ({size}) must be divisible by {layout.divisor}: start a multiple of {layout.smallest_world} "
            "processes, or change parallel.*"
        )
    world, bridge = _meet(prepare(get_platform()), launch, timeout_s, apart)
    with grid(get_platform(), layout, world, seed, timeout_s, launch.local_rank if launch else 0) as ctx:
        yield replace(ctx, bridge=bridge)


def prepare(platform: Platform) -> Platform:
    """`platform`, for which megatron-core is made ready; see device_shim."""
    device_shim.bind_missing_names()
    if platform.needs_shim:
        device_shim.install(platform)
    return platform


@contextmanager
def grid(
    platform: Platform,
    layout: Parallel,
    world: int,
    seed: int,
    timeout_s: float,
    local_rank: int,
    *,
    kind: type[ParallelContext] = ParallelContext,
) -> Iterator[ParallelContext]:
    """The model-parallel groups of a torch.distributed that has started, and their end.

    Args:
        kind: of context; a rehearsed rank has one that finds the other ranks nowhere.

    Raises:
        PeerLostError: another rank ended inside the `with` block.
    """
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    ctx = kind(
        platform=platform,
        layout=layout,
        dp=world // layout.model_parallel_size,
        rank=dist.get_rank(),
        world_size=world,
        local_rank=local_rank,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )
    try:
        yield ctx
    except RuntimeError as error:
        if PEER_LOST.search(str(error)) is None:
            raise
        raise PeerLostError(f"rank {ctx.rank} lost its connection to another rank, which has ended") from error
    # Not after an error: other ranks may be inside a collective, and taking the groups down would wait for them.
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
