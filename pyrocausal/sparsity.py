"""Sparse tables over (perturbation, program): the closed-form posterior of a spike and slab, and the rotation that makes a table sparse.

**Spike and slab.** With ``u_n ~ N(sum_t D_nt m_td e_td, 1)``, ``m_td ~ Bernoulli(rho)``, ``e_td ~ N(0, s^2)`` and the sufficient statistics
``A = D'D`` and ``B = D'E[u]``, coordinate ascent has the closed form (Titsias and Lazaro-Gredilla, NIPS 2011, eq. 9-11, for one task)

    r_td       = B_td - sum_{r != t} A_tr pi_rd mu_rd
    sigma_td^2 = 1 / (A_tt + 1/s^2)
    mu_td      = sigma_td^2 r_td
    logit pi_td = logit rho + log(sigma_td / s) + mu_td^2 / (2 sigma_td^2)

which is the exact posterior when no cell carries two perturbations.

**Rotation.** A Gaussian basal state with unit covariance and a free decoder leave the programs identified up to an orthogonal map R only.
What tells the axes apart is that perturbations act on few programs: among all ``W R`` the sparsest is the true one. The papers hope that
stochastic masks find it; a rotation finds it in a second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyrocausal.errors import PyrocausalError

PRIOR = 0.1, 3.0  # rho and s where nothing is learned, and what is learned leans to them
PRIOR_ENTRIES = 5.0  # fewer, and a screen in which nothing acts has a small s, and with it false targets


def spike_slab_update(
    gram: Tensor,
    cross: Tensor,
    log_odds: Tensor,
    slab: Tensor | float,
    probs: Tensor,
    loc: Tensor,
    trust: Tensor | float = 1.0,
    sweeps: int = 1,
    coupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinate ascent on q(mask, effect) given the sufficient statistics.

    Args:
        gram: ``A = D'D`` over the cells, [P, P].
        cross: ``B = D'E[u]``, [P, D].
        log_odds: prior log odds of a target, [P, D] or scalar.
        slab: prior standard deviation s of an effect.
        probs, loc: current ``pi`` and ``mu``, [P, D]; used only where perturbations occur together.
        trust: power in (0, 1] to which each entry's likelihood is raised, [P, D] or scalar; 1 is the exact posterior.
        sweeps: passes over the perturbations.
        coupled: whether perturbations occur together; if not, ``gram`` is diagonal and one vectorised pass is exact.

    Returns:
        ``(logits, loc, scale)``: posterior log odds of the mask, mean and standard deviation of the effect where the mask is on, [P, D].
    """
    trust = torch.as_tensor(trust, dtype=cross.dtype, device=cross.device).expand_as(cross)
    log_odds = log_odds.expand_as(cross)
    scale = (trust * gram.diagonal()[:, None] + 1 / slab**2).rsqrt()
    if not coupled:
        loc = scale**2 * trust * cross
        return log_odds + torch.log(scale / slab) + loc**2 / (2 * scale**2), loc, scale
    probs, loc, logits = probs.clone(), loc.clone(), torch.empty_like(cross)
    for _ in range(sweeps):
        for t in range(len(gram)):
            others = gram[t] @ (probs * loc) - gram[t, t] * probs[t] * loc[t]
            loc[t] = scale[t] ** 2 * trust[t] * (cross[t] - others)
            logits[t] = log_odds[t] + torch.log(scale[t] / slab) + loc[t] ** 2 / (2 * scale[t] ** 2)
            probs[t] = logits[t].sigmoid()
    return logits, loc, scale


def sparse_rotation(table: Tensor, starts: int = 4, steps: int = 300, seed: int = 0, local: bool = False) -> Tensor:
    """The orthogonal R that makes ``table @ R`` sparsest in the L1 sense.

    Each start maximises sum (W R)^4 by its polar fixed point ``R <- polar(W' (W R)^3)`` (Zhai et al., JMLR 2020), then descends on the
    smoothed L1 norm ``sum sqrt((W R)^2 + eps^2)`` over the rotations ``R0 expm(S - S')``, with eps falling from 3 to 0.3 times the
    median size of an entry. The start with the smallest norm wins.

    Args:
        table: W, one row per perturbation, [P, D].
        local: descend from the identity only, to mend axes that are nearly right.

    Returns:
        R, [D, D], orthogonal.
    """
    w = table.double()
    w = w[w.norm(dim=1) > 0]
    n_latent = table.shape[1]
    if len(w) == 0:
        return torch.eye(n_latent, dtype=table.dtype, device=table.device)
    generator = torch.Generator().manual_seed(seed)
    unit = w.square().mean().sqrt()
    best: tuple[float, Tensor] | None = None
    with torch.enable_grad():
        for _ in range(1 if local else starts):
            r, _ = torch.linalg.qr(torch.randn(n_latent, n_latent, generator=generator, dtype=torch.float64).to(w.device))
            if local:
                r = torch.eye(n_latent, dtype=w.dtype, device=w.device)
            for _ in range(0 if local else 200):
                left, _, right = torch.linalg.svd(w.T @ (w @ r) ** 3)
                r = left @ right
            skew = torch.zeros_like(r, requires_grad=True)
            optimiser = torch.optim.Adam([skew], lr=0.02)
            for step in range(steps):
                eps = unit * 0.1 * (1.0 if local else 10 ** (1 - min(1.0, 2 * step / steps)))
                turned = w @ r @ torch.matrix_exp(skew - skew.T)
                norm = (turned**2 + eps**2).sqrt().sum()
                optimiser.zero_grad()
                norm.backward()
                optimiser.step()
            r = (r @ torch.matrix_exp(skew - skew.T)).detach()
            value = float((w @ r).abs().sum())
            if best is None or value < best[0]:
                best = (value, r)
    assert best is not None
    return best[1].to(table.dtype)


class SpikeSlabTable(nn.Module):
    """q(mask, effect) of a table [n_perturbations, n_latent], kept by its sufficient statistics rather than by gradients.

    ``observe`` folds the programs of a minibatch into a running ``B`` (each perturbation forgets at its own pace, about twice per epoch),
    then runs the coordinate update. Until ``sparse()`` is called the mask is held on, so that the programs are found before their targets.

    With ``robust`` (the default) the table knows that encoder and axes are never perfect. A program that a perturbation does not target
    still shows a little of its own (``blur``), and a trace of what the perturbation does to the programs beside it (``leak * beside``);
    with hundreds of cells the exact posterior would call each such trace a target. So the mean of an entry without target is Laplace with
    scale ``b = sqrt(blur^2 + (leak beside)^2)``, not zero. Both are learned per program from the entries that are off (empirical Bayes
    with prior means ``BLUR`` and ``LEAK``), and the evidence of an entry is tempered by ``1 / (1 + 2 n b^2)``, a coarsened posterior
    (Miller and Dunson, JASA 2019). ``robust=False`` is the exact update of :func:`spike_slab_update`.

    A prior that is not given is learned when the targets are first inferred: expectation-maximisation from s = 3, and rho = 1/2 if that is
    free too, over the perturbations with cells; ``PRIOR`` counts as ``PRIOR_ENTRIES`` entries. Then it is kept: as the networks follow
    their targets, the few with the largest effects would take all of it::

        rho = mean pi,   s^2 = sum pi (mu^2 + sigma^2) / sum pi
    """

    gram: Tensor
    cross: Tensor
    seen: Tensor
    logits: Tensor
    loc: Tensor
    scale: Tensor
    blur: Tensor
    leak: Tensor
    is_sparse: Tensor
    mask_probability: Tensor
    effect_scale: Tensor

    ON = 12.0  # logit of a mask entry that is held on
    LEAK = 0.05  # prior: an axis is right to a twentieth
    BLUR = 0.05  # prior, in basal standard deviations

    def __init__(
        self, n_perturbations: int, n_latent: int, mask_probability: float | None, effect_scale: float | None, robust: bool = True
    ) -> None:
        super().__init__()
        self.robust = robust
        if mask_probability is not None and not 0 < mask_probability < 1:
            raise PyrocausalError(f"mask_probability={mask_probability!r} was given; give a share between 0 and 1, or None to learn it")
        self.learns = mask_probability is None, effect_scale is None
        self.log_odds = None if mask_probability is None else math.log(mask_probability) - math.log1p(-mask_probability)
        shape = (n_perturbations, n_latent)
        for name, given, first in zip(("mask_probability", "effect_scale"), (mask_probability, effect_scale), PRIOR, strict=True):
            self.register_buffer(name, torch.tensor(first if given is None else float(given)))
        self.register_buffer("gram", torch.zeros(n_perturbations, n_perturbations))
        self.register_buffer("cross", torch.zeros(shape))
        self.register_buffer("seen", torch.zeros(n_perturbations))
        self.register_buffer("logits", torch.full(shape, self.ON))
        self.register_buffer("loc", torch.zeros(shape))
        self.register_buffer("scale", torch.full(shape, float(self.effect_scale)))
        self.register_buffer("blur", torch.zeros(n_latent))
        self.register_buffer("leak", torch.zeros(n_latent))
        self.register_buffer("is_sparse", torch.zeros((), dtype=torch.bool))
        self.prior_weight = 1.0  # warm-up of the sparsity: the prior odds count with this weight
        self._coupled: bool | None = None
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_coupled", None))

    def set_gram(self, gram: Tensor) -> None:
        """``D'D`` over the training cells, [P, P]."""
        self.gram.copy_(gram)
        self._coupled = None

    @property
    def coupled(self) -> bool:
        """Whether any cell carries two perturbations (found once: a host synchronisation)."""
        if self._coupled is None:
            self._coupled = bool((self.gram - torch.diag(self.gram.diagonal())).abs().sum() > 0)
        return self._coupled

    def expected(self) -> Tensor:
        """E[mask * effect], [P, D]."""
        return self.logits.sigmoid() * self.loc

    @torch.no_grad()
    def observe(self, dose: Tensor, u: Tensor) -> None:
        """Fold in the mean programs ``u`` [n, D] of cells treated with ``dose`` [n, P]."""
        n_t = self.gram.diagonal()
        weight = dose.square().sum(0)  # [P]: D'D of the batch, the cells of each perturbation for 0/1 doses
        rate = (2 * weight / n_t.clamp_min(1)).clamp(max=1)  # forget on the scale of half an epoch
        rate = torch.maximum(rate, torch.where(weight > 0, weight / (weight + self.seen), 0.0))  # a plain average at the start
        mean = n_t[:, None] * (dose.T @ u) / weight.clamp_min(1e-6)[:, None]
        self.cross += rate[:, None] * (mean - self.cross)
        self.seen += weight
        self.update()

    def learn_prior(self) -> None:
        """The M-step of the prior's free parts, given the posterior of the perturbations with cells."""
        there = (self.gram.diagonal() > 0).to(self.loc.dtype)[:, None]
        on, (rho, s) = there * self.logits.sigmoid(), PRIOR
        square = on * (self.loc**2 + self.scale**2)
        if self.learns[0]:
            self.mask_probability.copy_((on.sum() + PRIOR_ENTRIES * rho) / (there.sum() * on.shape[1] + PRIOR_ENTRIES))
        if self.learns[1]:
            self.effect_scale.copy_(((square.sum() + PRIOR_ENTRIES * s**2) / (on.sum() + PRIOR_ENTRIES)).sqrt())

    @torch.no_grad()
    def update(self, sweeps: int = 1) -> None:
        """One coordinate-ascent pass given the current statistics, and one EM step of the leak."""
        probs, log_odds = self.logits.sigmoid(), self.prior_weight * self.prior_log_odds()
        n_t = self.gram.diagonal()[:, None].clamp_min(1)
        spread = self._spread(probs * self.loc)
        trust = 1 / (1 + 2 * n_t * spread**2)  # a Laplace(b) has variance 2 b^2
        logits, loc, scale = spike_slab_update(
            self.gram, self.cross, log_odds, self.effect_scale, probs, self.loc, trust, sweeps, self.coupled
        )
        if self.robust:
            others = (self.gram @ (probs * self.loc) - n_t * probs * self.loc) / n_t if self.coupled else 0.0
            mean = self.cross / n_t - others  # what the perturbation does, by its cells
            logits = log_odds + self._log_bayes_factor(mean, n_t, spread)
        self.logits.copy_(torch.where(self.is_sparse, logits.clamp(-self.ON, self.ON), self.ON))
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        if self.robust:
            blur, leak = self._estimated_misfit(mean, n_t)
            self.blur.copy_(torch.where(self.is_sparse, blur, 0.0))
            self.leak.copy_(torch.where(self.is_sparse, leak, 0.0))

    def _beside(self, moved: Tensor) -> Tensor:
        """How far each perturbation moves the other programs, [P, D]."""
        return (moved.square().sum(1, keepdim=True) - moved.square()).clamp_min(0).sqrt()

    def _spread(self, moved: Tensor) -> Tensor:
        """Scale b of the Laplace spike: what a program without target shows, by itself and of the targets beside it, [P, D]."""
        return (self.blur**2 + (self.leak * self._beside(moved)) ** 2).sqrt()

    def _estimated_misfit(self, mean: Tensor, n_t: Tensor) -> tuple[Tensor, Tensor]:
        """``blur`` and ``leak`` of each program from its entries without target, [D] each.

        ``blur`` is the mean size of an entry beyond its sampling noise, over perturbations that move little else; ``leak`` the slope of
        what is left against ``beside``. Each has a prior that counts as much as a few perturbations.
        """
        off, beside = 1 - self.logits.sigmoid(), self._beside(self.expected())
        excess = (mean.abs() - 0.8 * n_t.rsqrt()).clamp_min(0)  # 0.8: mean size of a standard normal, the sampling noise
        quiet = off / (1 + beside.square())
        blur = ((quiet * excess).sum(0) + 2 * self.BLUR) / (quiet.sum(0) + 2)
        left = (excess - blur).clamp_min(0)
        top, bottom = (off * beside * left).sum(0), (off * beside.square()).sum(0)
        leak = (top + bottom.mean() * self.LEAK) / (bottom + bottom.mean()).clamp_min(1e-6)
        return torch.minimum(blur, self.effect_scale / 6), leak.clamp(max=0.2)

    def _log_bayes_factor(self, mean: Tensor, n_t: Tensor, spread: Tensor) -> Tensor:
        """log p(mean | target) - log p(mean | no target), [P, D]: a Gaussian slab against a Laplace spike."""
        variance = self.effect_scale**2 + 1 / n_t
        slab = -0.5 * mean**2 / variance - 0.5 * (2 * torch.pi * variance).log()
        b = (spread**2 + 0.5 / n_t).sqrt()
        return slab + mean.abs() / b + (2 * b).log()

    def means(self) -> Tensor:
        """Mean programs of the cells of each perturbation (their least-squares part, if perturbations occur together), [P, D]."""
        ridge = self.gram + 1e-3 * torch.eye(len(self.gram), device=self.gram.device)
        return torch.linalg.solve(ridge, self.cross) if self.coupled else self.cross / self.gram.diagonal().clamp_min(1)[:, None]

    def prior_log_odds(self) -> Tensor:
        if self.log_odds is None:
            return torch.logit(self.mask_probability)
        return torch.as_tensor(self.log_odds, dtype=self.logits.dtype, device=self.logits.device)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the programs: W -> W R."""
        self.cross.copy_(self.cross @ rotation)
        self.loc.copy_(self.loc @ rotation)

    @torch.no_grad()
    def sparse(self) -> None:
        """From here on the mask is inferred; the leak starts from the median entry, since most entries are off."""
        first = not bool(self.is_sparse)
        self.is_sparse.fill_(True)
        if self.robust:
            means = self.means()
            self.leak.copy_((means.abs().median(0).values / (0.69 * self._beside(means).median(0).values).clamp_min(1e-6)).clamp(max=0.2))
        if first and self.learns[0]:
            self.mask_probability.fill_(0.5)
        weight, self.prior_weight = self.prior_weight, 1.0 if first else self.prior_weight
        for _ in range(20):  # let prior, leak and targets agree before the networks follow
            self.update()
            if first:
                self.learn_prior()
        self.prior_weight = weight
