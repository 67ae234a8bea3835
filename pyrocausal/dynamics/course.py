"""Linear latent dynamics whose mechanisms a perturbation changes: steps, their composition, and paths.

Row vectors, D programs u and the invariant state w of a cell, [n_invariant]; step t leads from time t - 1 to time t under the treatment
``c_t`` [P] of that interval::

    keep   = prod_p (1 - c_p m_p)                                 m_p: the programs that p targets lose their parents
    mu     = keep b + sum_p c_p m_p dmu_p,    log sd^2 = keep s + sum_p c_p m_p ds_p
    steps  u_t = u_t L + u_{t-1} B + w C + mu + sd z_t            columns of L, B, C times keep; L strictly upper triangular
    ou     du  = (u K + w C + mu) dt + sd dW                      K = B - diag(decay), off the diagonal times keep

Either way ``u_t = u_{t-1} F + w G + h + z_t N`` with z_t standard normal. A program that is held at v has no parents and no noise.

:func:`steps_of` makes the steps of R treatment courses, :func:`roll` follows cells along them, :func:`loadings` composes them: what every
program at every time is, as a linear map of the cell's exogenous state ``z = (w, z_0, ..., z_T)``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Transition = Literal["steps", "ou"]
HALVINGS = 6  # a step of the continuous form is composed of 2^6 short ones


class Mechanism(NamedTuple):
    """The parameters, D programs, I invariant coordinates, P perturbations.

    Attributes:
        instant: L, [D, D], strictly upper triangular (``"steps"``). lagged: B, [D, D]. decay: [D] (``"ou"``).
        invariant: C, [I, D]. mean: b, [D]. log_var: s, [D].
        start: how programs start at the first time, ``u_0 = w C_0 + b_0 + z_0 N_0``: [I, D], [D], [D, D] (``"ou"``).
        mask: m, [P, D]. mean_change: dmu, [P, D]. log_var_change: ds, [P, D].
        cuts: whether targets lose their parents (``keep`` as above; otherwise it is 1).
        free: changes of L, B and C by each perturbation, [P, D, D], [P, D, D], [P, I, D]; None where weights are gated only.
    """

    instant: Tensor
    lagged: Tensor
    decay: Tensor
    invariant: Tensor
    mean: Tensor
    log_var: Tensor
    start: tuple[Tensor, Tensor, Tensor]
    mask: Tensor
    mean_change: Tensor
    log_var_change: Tensor
    cuts: bool = True
    free: tuple[Tensor, Tensor, Tensor] | None = None


class Step(NamedTuple):
    """One step of R courses: F [R, D, D], G [R, I, D], h [R, D], N [R, D, D]; ``held`` [R, D], NaN where free.

    ``throughout``: what is held is held from the beginning of the interval (``"ou"``), not only at its end (``"steps"``).
    """

    carry: Tensor
    invariant: Tensor
    offset: Tensor
    noise: Tensor
    held: Tensor
    throughout: bool


def steps_of(m: Mechanism, course: Tensor, held: Tensor, times: Tensor, transition: Transition) -> list[Step]:
    """The T + 1 steps of R courses; the first has nothing before it.

    Args:
        course: treatment during the interval that leads to each time, [R, T + 1, P]; of the first, at that time.
        held: values at which programs are held, [R, T + 1, D], NaN where free. times: [T + 1].
    """
    return [_step(m, course[:, t], held[:, t], times, t, transition) for t in range(len(times))]


class Gates(NamedTuple):
    """One interval of R courses, its targets and holds applied: L, B [R, D, D], C [R, I, D], mu, sd, keep, and what is free, [R, D]; the
    values at which programs are held, 0 where they are free, [R, D]."""

    instant: Tensor
    lagged: Tensor
    invariant: Tensor
    mu: Tensor
    sd: Tensor
    keep: Tensor
    free: Tensor
    value: Tensor


def gates(m: Mechanism, c: Tensor, held: Tensor) -> Gates:
    """Of treatments [R, P] and holds [R, D]."""
    kept = (1 - c.unsqueeze(-1) * m.mask).clamp_min(0).prod(-2)  # [R, D]
    keep = kept if m.cuts else torch.ones_like(kept)
    mu = keep * m.mean + c @ (m.mask * m.mean_change)
    sd = (0.5 * (keep * m.log_var + c @ (m.mask * m.log_var_change))).exp()
    L, B, C = (weight * keep.unsqueeze(-2) for weight in (m.instant, m.lagged, m.invariant))
    if m.free is not None:
        dL, dB, dC = (torch.einsum("rp,pij->rij", c, change) for change in m.free)
        L, B, C = L + dL, B + dB, C + dC
    free = held.isnan()
    value, gate = torch.where(free, torch.zeros_like(held), held), free.to(mu.dtype)
    L, B, C = (weight * gate.unsqueeze(-2) for weight in (L, B, C))
    return Gates(L, B, C, mu * gate, sd * gate, keep * gate, gate, value)


def _step(m: Mechanism, c: Tensor, held: Tensor, times: Tensor, t: int, transition: Transition) -> Step:
    L, B, C, mu, sd, _, gate, value = gates(m, c, held)
    eye = torch.eye(mu.shape[-1], dtype=mu.dtype, device=mu.device)
    if transition == "steps":
        back = torch.linalg.solve_triangular((eye - L), torch.diag_embed(torch.ones_like(mu)), upper=True)  # (1 - L)^-1
        carry = torch.zeros_like(B) if t == 0 else B @ back
        return Step(carry, C @ back, ((mu + value).unsqueeze(-2) @ back).squeeze(-2), sd.unsqueeze(-1) * back, held, False)
    if t == 0:
        C0, b0, N0 = (x.expand(len(c), *x.shape) for x in m.start)
        N0 = N0 * gate.unsqueeze(-2)
        return Step(torch.zeros_like(B), C0 * gate.unsqueeze(-2), b0 * gate + value, N0, held, True)
    K = B - torch.diag_embed(m.decay * gate)
    F, J, Q = _flow(K, sd.square(), times[t] - times[t - 1])
    Q = Q + torch.diag_embed(1 - gate)  # held programs have no noise; 1 so that there is a factor
    N = torch.linalg.cholesky(0.5 * (Q + Q.mT)).mT * gate.unsqueeze(-2) * gate.unsqueeze(-1)
    return Step(F, C @ J, (mu.unsqueeze(-2) @ J).squeeze(-2), N, held, True)


def _flow(K: Tensor, variance: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``e^{K length}``, its integral, and the covariance of the noise, for ``du = u K dt + sd dW``; [R, D, D] each.

    From a short step by doubling, which does not overflow where the integral of the noise backwards would.
    """
    D, short = K.shape[-1], length / 2**HALVINGS
    zero, eye = torch.zeros_like(K), torch.eye(D, dtype=K.dtype, device=K.device).expand_as(K)
    both = torch.linalg.matrix_exp(short * torch.cat([torch.cat([K, eye], -1), torch.cat([zero, zero], -1)], -2))
    F, J = both[..., :D, :D], both[..., :D, D:]
    noise = torch.cat([torch.cat([-K.mT, torch.diag_embed(variance)], -1), torch.cat([zero, K], -1)], -2)
    Q = F.mT @ torch.linalg.matrix_exp(short * noise)[..., :D, D:]
    for _ in range(HALVINGS):
        Q, J, F = Q + F.mT @ Q @ F, J + J @ F, F @ F
    return F, J, Q


def roll(steps: list[Step], row: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """Programs of cells at all times, [n, T + 1, D].

    Args:
        row: course of each cell, [n]. w: invariant states, [n, I]. z: noise, [n, T + 1, D].
    """
    path: list[Tensor] = []
    for t, step in enumerate(steps):
        before = path[-1] if path else torch.zeros_like(z[:, 0])
        held = step.held[row]
        before = torch.where(held.isnan(), before, held) if step.throughout else before
        now = step.offset[row] + _times(before, step.carry[row]) + _times(w, step.invariant[row]) + _times(z[:, t], step.noise[row])
        path.append(torch.where(held.isnan(), now, held))
    return torch.stack(path, 1)


def _times(rows: Tensor, tables: Tensor) -> Tensor:
    return (rows.unsqueeze(-2) @ tables).squeeze(-2)


def loadings(steps: list[Step]) -> tuple[Tensor, Tensor]:
    """``u_t = z A_t + k_t`` for the exogenous state ``z = (w, z_0, ..., z_T)``: A [R, T + 1, I + (T + 1) D, D] and k [R, T + 1, D]."""
    R, n_w, D = steps[0].invariant.shape
    T = len(steps)
    A = steps[0].carry.new_zeros(R, n_w + T * D, D)
    k = steps[0].offset.new_zeros(R, D)
    maps, offsets = [], []
    for t, step in enumerate(steps):
        held, free = torch.where(step.held.isnan(), 0.0, step.held), step.held.isnan().to(k.dtype)
        A, k = (A * free.unsqueeze(-2), k * free + held) if step.throughout else (A, k)
        blocks = [step.invariant, *[torch.zeros_like(step.noise)] * t, step.noise, *[torch.zeros_like(step.noise)] * (T - t - 1)]
        A = A @ step.carry + torch.cat(blocks, -2)
        k = _times(k, step.carry) + step.offset
        maps.append(A)
        offsets.append(k)
    return torch.stack(maps, 1), torch.stack(offsets, 1)


def distinct(course: Tensor, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The different rows among cells' courses [n, T + 1, P] and holds [n, T + 1, D], and the row of each cell, [n]."""
    n, free = len(course), held.isnan()
    key = torch.cat([course.reshape(n, -1), free.reshape(n, -1).to(course.dtype), held.nan_to_num().reshape(n, -1).to(course.dtype)], 1)
    _, row = torch.unique(key, dim=0, return_inverse=True)
    first = torch.full((int(row.max()) + 1 if n else 0,), n, device=row.device)
    first = first.scatter_reduce(0, row, torch.arange(n, device=row.device), "amin")
    return course[first], held[first], row
