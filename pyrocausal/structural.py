"""Primitives of a structural model that models call in their ``forward``."""

from __future__ import annotations

import torch
from torch import Tensor


def mechanism_shift(dose: Tensor, table: Tensor) -> Tensor:
    """The shift of every program in every cell, ``dose @ table``, in one world or in many.

    Args:
        dose: treatment of each cell, [..., n, n_perturbations].
        table: what each perturbation does to each program (``mask * effect``): [n_perturbations, n_latent], or with the dimensions of
            draws and interventions on the left and a 1 for the cells, [S, K, 1, n_perturbations, n_latent].

    Returns:
        [..., n, n_latent].
    """
    if table.dim() == 2:
        return dose @ table
    if table.shape[-3] != 1:  # a table of its own for every cell
        return torch.einsum("...p,...pd->...d", dose, table)
    table = table.squeeze(-3)
    if table.dim() == 4 and table.shape[1] == 1 and dose.dim() <= 3:  # draws x interventions: one product per draw
        lead = dose.shape[:-1]
        out = dose.reshape(-1, dose.shape[-1]) @ table.squeeze(1)  # [S, K * n, D]
        return out.reshape(table.shape[0], *((1,) * (3 - len(lead) - 1)), *lead, table.shape[-1])
    return dose @ table
