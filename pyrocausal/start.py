"""Where training starts: programs along what the perturbations do, rather than anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

START = 3.0  # standard deviations by which a perturbation moves its program at first


@torch.no_grad()
def moment_start(guide: Any, model: Any, x: Tensor, dose: Tensor, library_size: Tensor) -> None:
    """Programs along what the perturbations do, ``START`` standard deviations away, and an encoder that reads them off.

    Perturbations of one target (known, or found by clustering the directions of the mean responses) give a program its loadings; programs
    that are left take the main axes of the unperturbed cells. An anchored decoder has its axes already.
    """
    counts, decoder = model.likelihood.is_counts, model.decoder
    control = dose.sum(1) == 0
    if not control.any():
        control = torch.ones_like(control)
    h = guide.standardise(x)
    model.likelihood.bound(x)
    scale = x.sum(0) / library_size.sum() if counts else x[control].mean(0)
    decoder.bias.copy_(scale.clamp_min(1e-8).log() if counts else scale)
    if not counts:
        model.likelihood.log_sigma.copy_((0.7 * x[control].std(0)).clamp_min(1e-2).log())
    size = dose.sum(0).clamp_min(1)[:, None]
    in_h = (dose.T @ h) / size - h[control].mean(0)  # [P, G], what each perturbation does to the encoder's input
    if counts:
        rate, base = (
            (dose.T @ x + scale) / (dose.T @ library_size[:, None] + 1),
            (x[control].sum(0) + scale) / (library_size[control].sum() + 1),
        )
        in_eta = (rate / base).log().clamp(-3, 3).nan_to_num(0.0)  # 0 / 0: a gene without a count in these cells
    else:
        in_eta = (dose.T @ x) / size - x[control].mean(0)
    if decoder.kind == "anchored":
        read = decoder.loadings * (guide.standardise.scale if counts else 1 / guide.standardise.scale)
    else:
        belongs, sign = _grouped(guide, in_h * size.sqrt(), model.shape[1])
        share = belongs * size / (belongs * size).sum(0).clamp_min(1e-12)  # [P, D]
        read = share.T @ (sign * in_h) / START
        write = share.T @ (sign * in_eta) / START
        empty = belongs.sum(0) == 0
        if empty.any():
            spread = h[control] - h[control].mean(0)
            _, s, axes = torch.linalg.svd(spread[:2000], full_matrices=False)
            axes = axes[: int(empty.sum())] * (s[: int(empty.sum())] / len(spread[:2000]) ** 0.5)[:, None]
            where = torch.nonzero(empty).ravel()[: len(axes)]
            read[where] = axes
            write[where] = axes * (1.0 if counts else guide.standardise.scale)
        decoder.weight.copy_(write)
    ridge = 1e-3 * read.square().sum(1).mean() * torch.eye(len(read), dtype=read.dtype, device=read.device)
    inverse = torch.linalg.solve(read @ read.T + ridge, read)  # [D, G]
    linear = guide.encoder.linear
    linear.weight.zero_()
    linear.weight[:, : read.shape[1]] = inverse
    linear.bias.copy_(-(inverse @ h[control].mean(0)))
    guide.table.loc.fill_(START)


def _grouped(guide: Any, response: Tensor, n_latent: int) -> tuple[Tensor, Tensor]:
    """Which perturbation starts at which program, [P, D] of 0 and 1, and with which sign, [P, 1].

    Known targets as they are; otherwise perturbations whose response [P, G] (in standard errors) is beyond noise are grouped by direction,
    whatever its sign: k-means on the sphere, the best of several starts.
    """
    n_perturbations = len(response)
    if guide.table.targets is not None:
        return guide.table.targets, torch.ones_like(response[:, :1])
    out, sign = response.new_zeros(n_perturbations, n_latent), torch.ones_like(response[:, :1])
    excess = response.square().mean(1) - 1
    strong = torch.nonzero(excess > 4 * (2 / response.shape[1]) ** 0.5).ravel()
    if len(strong) == 0:
        return out, sign
    r = response[strong]
    unit = r / r.norm(dim=1, keepdim=True)
    k = min(len(strong), n_latent)
    generator = torch.Generator(device="cpu").manual_seed(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(10):
        first = int(torch.randint(len(unit), (1,), generator=generator))
        centres = unit[first : first + 1]
        while len(centres) < k:  # the farthest next
            nearest = (unit @ centres.T).square().max(1).values
            chance = (1 - nearest).clamp_min(1e-9) ** 2
            centres = torch.cat([centres, unit[torch.multinomial(chance, 1, generator=generator)]])
        for _ in range(20):
            cosine = unit @ centres.T
            member = cosine.square().argmax(1)
            for j in range(k):
                mine = r[member == j]
                if len(mine):
                    centres[j] = torch.linalg.svd(mine, full_matrices=False)[2][0]
        cosine = unit @ centres.T
        fitted = float((r.norm(dim=1) * cosine.abs().max(1).values).square().sum())
        if best is None or fitted > best[0]:
            best = fitted, cosine.square().argmax(1), cosine
    assert best is not None
    _, member, cosine = best
    towards = cosine[torch.arange(len(strong)), member]  # a program points where most of what moves it points
    most = torch.zeros(k, dtype=r.dtype, device=r.device).index_add_(0, member, towards * r.norm(dim=1))
    sign[strong, 0] = towards.sign() * torch.where(most < 0, -1.0, 1.0)[member]
    number = {int(j): i for i, j in enumerate(dict.fromkeys(member.tolist()))}  # programs in the order of their first perturbation
    out[strong, torch.tensor([number[j] for j in member.tolist()], device=out.device)] = 1
    return out, sign
