"""The effective rank of a matrix whose rows are split over ranks, exact or sketched, without gathering the matrix.

The effective rank (Roy and Vetterli 2007) of a matrix with singular values s_1, s_2, ... is exp(H), where H is the entropy of
p_i = s_i / sum(s). A matrix with k equal singular values, and otherwise zeros, has effective rank k. With S = sum(s) and
T = sum(s log s), H = log S - T / S. S and T are traces of functions of the Gram matrix G = WᵀW: S = tr G^(1/2) and
T = tr (G^(1/2) log G^(1/2)). G and G v are sums over blocks of rows: each rank computes its part, and the parts are reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

SKETCH_COLUMNS = 64  # largest directions whose singular values are computed directly
PROBES, LANCZOS_STEPS = 8, 24  # for the estimate of the other directions


class SplitMatrix:
    """A matrix W [m, n] whose m rows are split over the ranks of some process groups.

    Args:
        rows: [m_local, n], the rows of this rank, of any floating-point dtype.
        groups: process groups whose ranks hold the other rows. All these ranks must call the same methods.
    """

    def __init__(self, rows: Tensor, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        self.rows = rows
        self.groups = [group for group in groups if group.size() > 1]

    @property
    def columns(self) -> int:
        """n."""
        return self.rows.shape[1]

    def gram(self) -> Tensor:
        """WᵀW, [n, n]. It is float64, because the square of a small singular value is lost in float32."""
        rows = self.rows.double()
        return self._sum(rows.t() @ rows)

    def times(self, v: Tensor) -> Tensor:
        """WᵀW v, [n, k] float32. v: [n, k] float32."""
        rows = self.rows.float()
        return self._sum(rows.t() @ (rows @ v))

    def _sum(self, part: Tensor) -> Tensor:
        for group in self.groups:
            dist.all_reduce(part, group=group)
        return part


@torch.no_grad()
def effective_rank(matrix: SplitMatrix, *, exact_up_to: int) -> float:
    """Compute the effective rank, from 1 to min(m, n); 0 for a matrix of zeros.

    Args:
        exact_up_to: largest number of columns for which the Gram matrix is computed and decomposed. For more columns, its
            traces are estimated.
    """
    if not matrix.groups and matrix.rows.shape[0] < matrix.columns:
        matrix = SplitMatrix(matrix.rows.t())
    squares, weights = _exact(matrix) if matrix.columns <= exact_up_to else _sketched(matrix)
    return rank_of_spectrum(squares, weights)


def rank_of_spectrum(squares: Tensor, weights: Tensor) -> float:
    """Compute the effective rank from squared singular values.

    Args:
        squares: [k] squared singular values.
        weights: [k], how many times each of them counts.
    """
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
    """Estimate the squared singular values: the largest ones by a random subspace (Halko et al. 2011), the others by Lanczos.

    An estimate of a trace from random probes is inaccurate if a few directions hold most of the trace, as after a collapse of
    the rank. The largest directions are therefore removed first (Hutch++, Meyer et al. 2021). The remaining spectrum is flat
    enough for a few probes. From each probe, Lanczos steps give the nodes and weights of a Gauss quadrature (Ubaru et al.
    2017). The random vectors are the same on every rank and in every call.

    Returns:
        Squared singular values, and how many times each counts.
    """
    n, device = matrix.columns, matrix.rows.device
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(n, SKETCH_COLUMNS, generator=generator).to(device)
    for _ in range(3):
        basis = torch.linalg.qr(matrix.times(basis)).Q
    top = torch.linalg.eigvalsh((basis.t() @ matrix.times(basis)).double().cpu())

    def rest(v: Tensor) -> Tensor:
        """(I - QQᵀ) G (I - QQᵀ) v, for v orthogonal to Q. Q is `basis`."""
        v = matrix.times(v)
        return v - basis @ (basis.t() @ v)

    probes = torch.randint(0, 2, (n, PROBES), generator=generator).to(device, torch.float32) * 2 - 1
    probes = probes - basis @ (basis.t() @ probes)
    nodes, weights = _quadrature(rest, probes)
    # The weights estimate the number of remaining directions, which is known: n - SKETCH_COLUMNS.
    weights = weights * ((n - SKETCH_COLUMNS) / weights.sum())
    return torch.cat([top, nodes]), torch.cat([torch.ones_like(top), weights])


def _quadrature(times: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a quadrature for the trace of a function of an operator, by Lanczos steps from each column of `start`.

    Args:
        times: applies the operator, symmetric and positive semidefinite, to [n, k].
        start: [n, k], the probes.

    Returns:
        Nodes and weights, each [k * LANCZOS_STEPS] float64 on the CPU. The weights of one probe add up to its squared norm
        divided by k.
    """
    lengths = start.norm(dim=0)
    basis = [start / lengths.clamp(min=1e-30)]
    diagonal, off = [], []
    for step in range(LANCZOS_STEPS):
        new = times(basis[-1])
        diagonal.append((new * basis[-1]).sum(dim=0))
        for _ in range(2):  # one pass of orthogonalisation is not accurate enough in float32
            for old in basis:
                new = new - old * (new * old).sum(dim=0)
        if step + 1 < LANCZOS_STEPS:
            beta = new.norm(dim=0)
            alive = beta > 1e-6 * torch.stack(diagonal).amax(dim=0)
            off.append(torch.where(alive, beta, 0.0))
            basis.append(torch.where(alive, new / beta.clamp(min=1e-30), 0.0))
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1).double().cpu())
    off_diagonal = torch.stack(off, dim=1).double().cpu()
    tridiagonal += torch.diag_embed(off_diagonal, offset=1) + torch.diag_embed(off_diagonal, offset=-1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)  # [k, steps], [k, steps, steps]
    weights = vectors[:, 0, :] ** 2 * (lengths.double().cpu() ** 2 / len(lengths))[:, None]
    return nodes.flatten(), weights.flatten()
