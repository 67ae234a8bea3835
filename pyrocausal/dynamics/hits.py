"""Whether a perturbation took in a cell, where that is learned: all ways in which a cell's perturbations may have."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrocausal.errors import DataError

MOST = 4  # perturbations of one cell


def ways(dose: Tensor, penetrance: Tensor) -> tuple[Tensor, Tensor]:
    """The 2^K ways of K perturbations to take.

    Args:
        dose: [n, P], at most K non-zeros in a row. penetrance: probability that each takes, [P].

    Returns:
        ``(hit, weight)``: which take, [n, 2^K, P] (1 for perturbations that the cell did not get), and probabilities [n, 2^K].
    """
    n, P = dose.shape
    K = max(1, int((dose != 0).sum(-1).max()))
    if K > MOST:
        raise DataError(f"a cell has {K} perturbations; a learned penetrance allows {MOST}, so give penetrance='full'")
    present, which = (dose != 0).to(dose.dtype).topk(min(K, P), -1)  # [n, K]
    bits = (
        torch.cartesian_prod(*[torch.arange(2, device=dose.device)] * which.shape[1]).reshape(-1, which.shape[1]).to(dose.dtype)
    )  # [H, K]
    rho = penetrance[which].unsqueeze(1)  # [n, 1, K]
    chance = torch.where(bits > 0, rho, 1 - rho)
    chance = torch.where(present.unsqueeze(1) > 0, chance, bits)  # without a perturbation there is one way
    miss = torch.zeros(n, len(bits), P, dtype=dose.dtype, device=dose.device)
    miss = miss.scatter(-1, which.unsqueeze(1).expand(-1, len(bits), -1), (1 - bits).expand(n, -1, -1) * present.unsqueeze(1))
    return 1 - miss, chance.prod(-1)


__all__ = ["ways"]
