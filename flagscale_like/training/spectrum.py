"""Effective rank of a matrix whose rows are spread over ranks, exact or sketched, without gathering it.

The effective rank (Roy and Vetterli 2007) of a matrix with singular values s_1, s_2, ... is exp(H), the exponential of the
entropy of p_i = s_i / sum(s): as many directions as equal ones would be needed for the same entropy. With S = sum(s) and
T = sum(s log s), H = log S - T / S, so that two traces of functions of the Gram matrix G = WᵀW are all that is needed:
S = tr G^(1/2), T = tr (G^(1/2) log G^(1/2)). G is a sum over blocks of rows, so is G v: the ranks add up their parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SKETCH_COLUMNS = 64  # directions that are taken exactly
PROBES, LANCZOS_STEPS = 8, 24  # of the estimate of the rest


class SplitMatrix:
    """W [m, n], of whose m rows this rank holds some; the other rows are with the other ranks of the groups.

    Args:
        rows: [m_local, n], any floating dtype.
        groups: process groups whose ranks hold the other rows; all their ranks make the same calls.
    """

    def __init__(self, rows: Tensor, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        self.rows = rows
        self.groups = [group for group in groups if group.size() > 1]

    @property
    def columns(self) -> int:
        return self.rows.shape[1]

    def gram(self) -> Tensor:
        """WᵀW, [n, n] float64: squaring halves the digits, and float32 would drown small singular values."""
        rows = self.rows.double()
        return self._sum(rows.t() @ rows)

    def times(self, v: Tensor) -> Tensor:
        """WᵀW v. v: [n, k] float32 -> [n, k]."""
        rows = self.rows.float()
        return self._sum(rows.t() @ (rows @ v))

    def _sum(self, part: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(part, group=group)
        return part


@torch.no_grad()
def effective_rank(matrix: SplitMatrix, *, exact_up_to: int) -> float:
    """The effective rank, from 1 to min(m, n); 0 for a matrix of zeros.

    Args:
        exact_up_to: columns, up to which the Gram matrix is made and decomposed; above, its traces are estimated.
    """
    if not matrix.groups and matrix.rows.shape[0] < matrix.columns:
        matrix = SplitMatrix(matrix.rows.t())
    squares, weights = _exact(matrix) if matrix.columns <= exact_up_to else _sketched(matrix)
    return rank_of_spectrum(squares, weights)


def rank_of_spectrum(squares: Tensor, weights: Tensor) -> float:
    """exp of the entropy of singular values that are given by their squares, each counted `weights` times."""
    squares = squares.clamp(min=0.0)
    largest = float(squares.max())
    if largest == 0.0:
        return 0.0
    values = squares.sqrt() / math.sqrt(largest)  # p does not depend on the scale
    total = float((weights * values).sum())
    return math.exp(math.log(total) - float((weights * torch.special.xlogy(values, values)).sum()) / total)


def _exact(matrix: SplitMatrix) -> tuple[Tensor, Tensor]:
    squares = torch.linalg.eigvalsh(matrix.gram().cpu())
    squares = torch.where(squares < squares[-1] * len(squares) * torch.finfo(torch.float64).eps, 0.0, squares)
    return squares, torch.ones_like(squares)


def _sketched(matrix: SplitMatrix) -> tuple[Tensor, Tensor]:
    """The largest squares from a random subspace (Halko et al. 2011), and a quadrature of the rest.

    A plain estimate of a trace is bad where a few directions hold most of it, which is just what a collapse in rank is: so
    these are taken out first (Hutch++: Meyer et al. 2021). What is left is flat enough for few random probes, on each of
    which Lanczos steps give the nodes and weights of a Gauss quadrature (Ubaru et al. 2017). The random vectors are the
    same at every call, and on every rank.
    """
    n, device = matrix.columns, matrix.rows.device
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(n, SKETCH_COLUMNS, generator=generator).to(device)
    for _ in range(3):
        basis = torch.linalg.qr(matrix.times(basis)).Q
    top = torch.linalg.eigvalsh((basis.t() @ matrix.times(basis)).double().cpu())

    def rest(v: Tensor) -> Tensor:
        """(I - QQᵀ) G (I - QQᵀ) v, for a v that has no part in Q."""
        v = matrix.times(v)
        return v - basis @ (basis.t() @ v)

    probes = torch.randint(0, 2, (n, PROBES), generator=generator).to(device, torch.float32) * 2 - 1
    probes = probes - basis @ (basis.t() @ probes)
    nodes, weights = _quadrature(rest, probes)
    # The probes' lengths scatter around the dimension of the rest, which is known.
    weights = weights * ((n - SKETCH_COLUMNS) / weights.sum())
    return torch.cat([top, nodes]), torch.cat([torch.ones_like(top), weights])


def _quadrature(times: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the trace of a function of an operator, by Lanczos steps from each column of `start`.

    Args:
        times: the operator on [n, k]; symmetric, not negative.
        start: [n, k] probes.

    Returns:
        [k * steps] each, float64 on the CPU; the weights of a probe add up to its squared length / k.
    """
    lengths = start.norm(dim=0)
    basis = [start / lengths.clamp(min=1e-30)]
    diagonal, off = [], []
    for step in range(LANCZOS_STEPS):
        new = times(basis[-1])
        diagonal.append((new * basis[-1]).sum(dim=0))
        for _ in range(2):  # once is not enough in float32
            for old in basis:
                new = new - old * (new * old).sum(dim=0)
        if step + 1 < LANCZOS_STEPS:
            beta = new.norm(dim=0)
            alive = beta > 1e-6 * torch.stack(diagonal).amax(dim=0)
            off.append(torch.where(alive, beta, 0.0))
            basis.append(torch.where(alive, new / beta.clamp(min=1e-30), 0.0))
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1).double().cpu())
    beside = torch.stack(off, dim=1).double().cpu()
    tridiagonal += torch.diag_embed(beside, offset=1) + torch.diag_embed(beside, offset=-1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)  # [k, steps], [k, steps, steps]
    weights = vectors[:, 0, :] ** 2 * (lengths.double().cpu() ** 2 / len(lengths))[:, None]
    return nodes.flatten(), weights.flatten()
