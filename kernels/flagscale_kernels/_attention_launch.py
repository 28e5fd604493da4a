"""Launches the kernels of flash and piecewise attention: arguments, outputs, gradients, and tiles by descriptors."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flagscale_kernels import _hopper_attention as hopper_attention
from flagscale_kernels import _hopper_backward as hopper_backward
from flagscale_kernels._layouts import PACKED, as_bnsd, sizes
from flagscale_kernels._rivals import Rivalry
from flagscale_kernels._tiles import Form, delta_kernel
from flagscale_kernels._triton import cdiv, next_power_of_2
from flagscale_kernels._tuning import TunedKernel, length_class

NO_BOUND = -1
DELTA_ROWS = 64
LARGEST_TILE = 256  # rows
SPARE_ROWS = 128  # of the sums of dQ behind each sequence: the most queries of a tile
FEWEST_QUERIES = 16  # of a tile
ORDERED_VARIABLE = "FLAGSCALE_KERNELS_ORDERED_DQ"  # 1: a deterministic backward has five products
LOG2E = 1.4426950408889634
hopper_forward, hopper_dkdv, hopper_dq = (
    Rivalry(f"flash attention's {name} for Hopper in Gluon") for name in ("forward", "dK and dV", "dQ")
)


class Kernels(NamedTuple):
    """The kernels of an operator. `added` and `ordered` give dK, dV and the sums of dQ (`_dq_sums.py`).

    `dk` and `dv` take heads that `dkdv` has no tiles for.
    """

    forward: TunedKernel
    dkdv: TunedKernel
    dk: TunedKernel
    dv: TunedKernel
    dq: TunedKernel
    added: TunedKernel
    ordered: TunedKernel


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An attention to compute: its inputs and options.

    pairs: (q, k) of each band, one for flash attention or near and far for piecewise attention. Tensors have the
    dimensions of `layout`. left, right: flash attention's bounds, or -1; right is 0 in causal piecewise attention.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    v: Tensor
    layout: str
    max_q: int
    max_k: int
    scale: float
    left: int = NO_BOUND
    right: int = NO_BOUND
    threshold: int = 0
    cap: float = 0.0
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None

    @property
    def heads(self) -> int:
        return sizes(self.pairs[0][0], self.layout)[1]

    @property
    def kv_heads(self) -> int:
        return sizes(self.v, self.layout)[1]

    @property
    def entries(self) -> int:
        return sizes(self.v, self.layout)[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def inputs(self) -> list[Tensor]:
        """q and k of each band, and v."""
        return [*(t for pair in self.pairs for t in pair), self.v]

    @property
    def is_empty(self) -> bool:
        return self.pairs[0][0].numel() == 0 or self.v.numel() == 0 or self.entries == 0

    def new_output(self) -> tuple[Tensor, Tensor]:
        """(o, LSE), not initialised except where no program writes: the tokens of a pack after its last sequence."""
        q = self.pairs[0][0]
        o = q.new_empty((*q.shape[:-1], self.v.shape[-1]))
        batch, heads, length = sizes(q, self.layout)
        shape = (heads, length) if self.layout == PACKED else (batch, heads, length)
        lse = torch.empty(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        if self.cu_q is not None:
            o.zero_()
            lse.fill_(-torch.inf)
        return o, lse

    def lse_without_keys(self) -> Tensor:
        """The LSE [n, s] of queries without keys: the sink, or -inf without sinks and after a pack's last sequence."""
        q = self.pairs[0][0]
        length = sizes(q, self.layout)[2]
        nothing = torch.full((self.heads, length), -torch.inf, dtype=torch.float32, device=q.device)
        if self.sinks is None:
            return nothing
        end = length if self.cu_q is None else self.cu_q[-1]
        return torch.where(torch.arange(length, device=q.device) < end, self.sinks.float()[:, None], nothing)

    def form(self, *others: Tensor) -> Form:
        """The constants of the kernels' code, for offsets into the inputs and `others`."""
        q = self.pairs[0][0]
        seq = [as_bnsd(t, self.layout).stride(2) for t in (*self.inputs, *others)]
        d, v = q.shape[-1], self.v.shape[-1]
        return Form(
            d, *split(d), v, *split(v),
            left=self.left != NO_BOUND,
            right=self.right != NO_BOUND,
            alibi=self.slopes is not None,
            cap=self.cap > 0,
            sinks=self.sinks is not None,
            packed=self.cu_q is not None,
            wide=max(seq) * LARGEST_TILE >= 1 << 31,
            # fp32 is for tests: exact products instead of tf32, which has a 10-bit mantissa.
            precision="ieee" if q.dtype == torch.float32 else "tf32",
        )  # fmt: skip


def split(columns: int) -> tuple[int, int]:
    """The widths of the one or two tiles that hold `columns`: powers of two, of at least 16."""
    whole = max(16, next_power_of_2(columns))
    if columns <= 64 or columns == whole:
        return whole, 0
    rest = max(16, next_power_of_2(columns - whole // 2))
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


class Launcher:
    """A jit kernel that takes tensors, and gives it tiles by descriptors where the config asks and the tensors allow.

    descriptors: the indices of the arguments that the kernel can read by a descriptor (TMA on sm_90), and the name of the
    option with the number of rows of their tiles. zeroed: the indices of the arguments that the kernel adds to.
    constants: further constants of the kernel.
    """

    def __init__(
        self, kernel: Any, name: str, *, descriptors: dict[int, str], zeroed: tuple[int, ...] = (), **constants: Any
    ) -> None:
        self.kernel, self.__name__, self.descriptors = kernel, name, descriptors
        self.zeroed, self.constants = zeroed, constants

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*args: Any, **options: Any) -> None:
            for i in self.zeroed:
                args[i].zero_()
            args, options = self._resolved(args, options)
            self.kernel[grid](*args, **options)

        return run

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        args, options = self._resolved(args, options)
        return self.kernel.warmup(*args, grid=grid, **options)

    def _resolved(self, args, options):
        form = options["FORM"]
        tensors = [args[i] for i in self.descriptors]
        given = options["DESCRIPTORS"] and descriptors_fit(tensors, form)
        options = options | self.constants | {"DESCRIPTORS": given}
        if not given:
            return args, options
        args = list(args)
        for i, rows in self.descriptors.items():
            args[i] = descriptor(args[i], options[rows])
        return args, options


def descriptors_fit(tensors: list[Tensor], form: Form) -> bool:
    """Whether descriptors can address the [b, n, s, d] views: 16-byte strides, tiles of one piece, sequences that end
    where the tensor ends (a tile of a pack would reach into the next sequence)."""
    if form.packed or form.d_b or form.v_b:
        return False
    for t in tensors:
        outer = [stride for size, stride in zip(t.shape[:3], t.stride()[:3]) if size > 1]
        if t.stride(3) != 1 or t.data_ptr() % 16 or any(s <= 0 or s * t.element_size() % 16 for s in outer):
            return False
    return True


def descriptor(t: Tensor, rows: int) -> Any:
    """A descriptor of the [b, n, s, d] view t for tiles [1, 1, rows, d]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    unit = 16 // t.element_size()  # the stride of a dimension of size 1 may be anything that is aligned
    outer = [stride if size > 1 else unit for size, stride in zip(t.shape[:3], t.stride()[:3])]
    return TensorDescriptor(t, list(t.shape), [*outer, 1], [1, 1, rows, max(16, next_power_of_2(t.shape[3]))])


def _views(problem, tensors):
    """([b, n, s, d] views, their strides but the last one by one)."""
    views = [as_bnsd(t, problem.layout) for t in tensors]
    return views, [stride for t in views for stride in t.stride()[:3]]


def _numbers(problem, *, flash):
    """(the ones of softmax and scores, the ones of lengths, bounds and heads), in the kernels' order."""
    p = problem
    cap = p.cap or 1.0
    softmax = (2 * LOG2E * p.scale / cap, cap / p.scale, p.scale * LOG2E)
    bounds = (p.left, p.right) if flash else (p.threshold,)
    return (1.0 / p.scale, *softmax) if flash else softmax, (
        p.max_q, p.max_k, *bounds, p.heads, p.heads // p.kv_heads
    )  # fmt: skip


def _options(problem, form, views, *, sums=False):
    """The keyword arguments of a launch that its tuning needs, and FORM.

    Tiles are listed by the width of heads: the larger one, or of kernels with `sums` of both widths their mean, as those
    fill the registers.
    """
    constants = form._replace(wide=False, precision="")
    aligned = descriptors_fit(views, form)
    key = (*constants, aligned, length_class(problem.max_k))
    widths = (form.d_a + form.d_b, form.v_a + form.v_b)
    width = sum(widths) // 2 if sums else max(widths)
    return {"block_d": width, "element_bytes": problem.v.element_size(), "key": key, "FORM": form}


def _statistics(problem, lse, *, flash):
    """The strides of the LSE, and of flash attention's slopes."""
    slopes = problem.slopes
    slope_stride = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
    return (lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2), *((slope_stride,) if flash else ()))


def _or(tensor, other):
    """A kernel's argument that its code does not use where it is None."""
    return other if tensor is None else tensor


def hopper_takes(problem: Problem, form: Form, kernels: Kernels, views: list[Tensor]) -> bool:
    """Whether the kernels for Hopper compute this problem from these views."""
    chip = kernels.forward.chip()
    flash = len(problem.pairs) == 1 and hopper_attention.takes(form, problem.v.dtype, right=problem.right, chip=chip)
    return flash and descriptors_fit(views, form)


def forward(problem: Problem, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """(o, LSE) by the Triton kernels."""
    p, flash = problem, len(problem.pairs) == 1
    o, lse = p.new_output()
    if p.is_empty:
        return o.zero_(), lse.copy_(p.lse_without_keys())
    form = p.form(o)
    views, strides = _views(p, [*p.inputs, o])
    softmax, lengths = _numbers(p, flash=flash)
    slopes = (_or(p.slopes, lse),) if flash else ()
    options = _options(p, form, views[1:-1])

    def plain():
        kernels.forward.launch(
            lambda c: (cdiv(p.max_q, c.bm) * p.heads * p.entries,),
            *views, lse, *slopes, _or(p.sinks, lse), _or(p.cu_q, lse), _or(p.cu_k, lse), *softmax, *lengths, *strides,
            *_statistics(p, lse, flash=flash), **options,
        )  # fmt: skip

    if hopper_takes(p, form, kernels, views):
        hopper_forward.launch(
            plain,
            lambda: hopper_attention.forward(*views, lse, qk_scale=p.scale * LOG2E, causal=form.right),
            (o, lse),
            (p.v.dtype, *options["key"]),
        )
    else:
        plain()
    return o, lse


def _delta(problem, form, do, dlse, o, lse):
    """(LSE in base 2, delta), each of the LSE's shape: the numbers per query that the backward reads."""
    p = problem
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    if p.sinks is not None and p.cu_q is not None:
        delta.zero_()  # no program writes the tokens after the last sequence
    views, strides = _views(p, [o, do])
    delta_kernel[(cdiv(p.max_q, DELTA_ROWS) * p.heads * p.entries,)](
        *views, lse, _or(dlse, lse), lse2, delta, _or(p.cu_q, lse), p.max_q, p.heads, *strides,
        lse.stride(0) if lse.dim() == 3 else 0, lse.stride(-2),
        HAS_DLSE=dlse is not None, FORM=form, BM=DELTA_ROWS, num_warps=4,
    )  # fmt: skip
    return lse2, delta


class SumsOfDq:
    """The fp32 buffers that five-product kernels add dQ to, without the softmax scale: one for each band."""

    def __init__(self, problem: Problem, form: Form) -> None:
        p, q = problem, problem.pairs[0][0]
        self.problem, width = p, form.d_a * (2 if form.d_b else 1)
        tokens, sequences = sizes(q, p.layout)[2], p.entries
        self.packed = p.cu_q is not None
        rows = tokens + (sequences + 1) * SPARE_ROWS if self.packed else cdiv(tokens, SPARE_ROWS) * SPARE_ROWS
        shape = (1 if self.packed else sequences, p.heads, rows, width)
        self.buffers = [torch.empty(shape, dtype=torch.float32, device=q.device) for _ in p.pairs]
        counts = len(p.pairs) * sequences * p.heads * cdiv(p.max_q, FEWEST_QUERIES)
        self.order = torch.empty(2 + counts, dtype=torch.int32, device=q.device)
        # Sequence i of a pack begins at its first token + i * SPARE_ROWS.
        self.strides = (SPARE_ROWS * width if self.packed else self.buffers[0].stride(0), rows * width)

    def write(self, dqs: list[Tensor]) -> None:
        """Write the gradients that the sums hold."""
        p = self.problem
        for dq, total in zip(dqs, self.buffers):
            view = as_bnsd(dq, p.layout)
            total = total[..., : view.shape[3]]
            if p.cu_q is not None:
                tokens = torch.arange(view.shape[2], device=dq.device, dtype=torch.int32)
                total = total[:, :, tokens + SPARE_ROWS * torch.bucketize(tokens, p.cu_q[1:].contiguous(), right=True)]
            torch.mul(total[:, :, : view.shape[2]], p.scale, out=view)


def backward(
    problem: Problem, kernels: Kernels, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, *, deterministic: bool
) -> tuple[list[Tensor], Tensor | None]:
    """([dq, dk of each band, dv], gradient of the sinks) by the Triton kernels."""
    p, flash = problem, len(problem.pairs) == 1
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in p.inputs]
    if p.is_empty or p.cu_q is not None:
        for t in gradients:
            t.zero_()
    if p.is_empty:
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        return gradients, None if p.sinks is None else sink_gradient(p.sinks, lse, delta)
    dqs, dks, dv = gradients[:-1:2], gradients[1:-1:2], gradients[-1]
    form = p.form(o, do, *gradients)
    lse2, delta = _delta(p, form, do, dlse, o, lse)
    views, strides = _views(p, [*p.inputs, do])
    (dq_views, _), (dk_views, _), (dv_view, dv_strides) = _views(p, dqs), _views(p, dks), _views(p, [dv])
    dq_strides, dk_strides = dq_views[0].stride()[:3], dk_views[0].stride()[:3]
    softmax, lengths = _numbers(p, flash=flash)
    slopes = (_or(p.slopes, lse),) if flash else ()
    rest = (lse2, delta, *slopes, _or(p.cu_q, lse), _or(p.cu_k, lse), p.scale, *softmax, *lengths, *strides)
    statistics = _statistics(p, lse, flash=flash)
    over_queries = _options(p, form, [*views[:-2:2], views[-1]], sums=True)

    def over_keys(kernel, sums, order, sum_strides):
        kernel.launch(
            lambda c: (cdiv(p.max_k, c.bn) * p.kv_heads * p.entries,),
            *views, *sums, order, *dk_views, *dv_view, *rest, *sum_strides, *dk_strides, *dv_strides, *statistics,
            **over_queries,
        )  # fmt: skip

    def offered(kernel):
        return kernel.offers(over_queries["block_d"], over_queries["element_bytes"])

    def plain_dkdv():
        for kernel in (kernels.dkdv,) if offered(kernels.dkdv) else (kernels.dk, kernels.dv):
            over_keys(kernel, dq_views, lse2, dq_strides[:2])

    def plain_dq():
        kernels.dq.launch(
            lambda c: (cdiv(p.max_q, c.bm) * p.heads * p.entries,),
            *views, *dq_views, *rest, *dq_strides, *statistics, **_options(p, form, [*views[1:-2:2], views[-2]]),
        )  # fmt: skip

    five_products = kernels.ordered if deterministic else kernels.added
    if (not deterministic or os.environ.get(ORDERED_VARIABLE) == "1") and offered(five_products):
        sums = SumsOfDq(p, form)
        over_keys(five_products, sums.buffers, sums.order, sums.strides)
        sums.write(dqs)
    elif hopper_takes(p, form, kernels, [*views, *dq_views, *dk_views, *dv_view]):
        given: dict[str, Any] = {"scale": p.scale, "qk_scale": p.scale * LOG2E, "causal": form.right}
        outputs, key = (*dk_views, *dv_view), (p.v.dtype, *over_queries["key"])
        hopper_dkdv.launch(
            plain_dkdv, lambda: hopper_backward.dkdv(*views, *outputs, lse2, delta, **given), outputs, key
        )
        hopper_dq.launch(plain_dq, lambda: hopper_backward.dq(*views, *dq_views, lse2, delta, **given), dq_views, key)
    else:
        plain_dkdv()
        plain_dq()
    return gradients, None if p.sinks is None else sink_gradient(p.sinks, lse, delta)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of each head's sink: it is a key of value 0, so its dS is exp(sink - LSE) (0 - delta).

    lse, delta: [b, n, s] or [n, s]. The tokens of a pack after its last sequence have an LSE of -inf and count nothing.
    """
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    total = -(p * delta).sum(-1)
    return (total if total.dim() == 1 else total.sum(0)).to(sinks.dtype)
