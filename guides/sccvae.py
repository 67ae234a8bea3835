"""Guides of SCCVAE.

:class:`SCCVAE`, the default, inverts the network (:mod:`pyrocausal.abduction`), so that control and perturbed cells both enter the
likelihood, and keeps targets and penetrances in closed form::

    q(u_n | x_n)      = Normal(a(x_n), diag v(x_n)^2)
    z_n               = u_n - f(u_n) A - S_n                       unit triangular Jacobian: log q(z) = log q(u)
    q(t_p, c_p)       exact given the cells' e_n = u_n - f(u_n) A:  with r_p = sum_n dose_np e_n and N_p cells,
      1/s_pk^2        = N_p + 1/tau_k^2
      mu_pk           = s_pk^2 (r_pk + m_k/tau_k^2)
      log q(t_p = k)  = log softmax(W e_p + w)_k + log(s_pk/tau_k) + mu_pk^2 / (2 s_pk^2) - m_k^2 / (2 tau_k^2) + const
      q(c_p | t_p=k)  = Normal(mu_pk, s_pk^2)
    q(A), q(h)        Normal per edge, and per perturbation

A perturbation without cells has ``q(t, c) = p(t, c)``: the network's guess from its embedding, and the prior penetrance (zero-shot).

:class:`SCCVAEParity` is the paper's: control cells are encoded, ``q(z | x) = Normal(mu(x), diag v(x))``, one draw for both branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.abduction import Abducted
from pyrocausal.data import PerturbationData
from pyrocausal.edges import EdgePosterior, EdgePrior, edge_index
from pyrocausal.likelihood import LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Encoder, Standardise, of_batch
from pyrocausal.start import moment_start
from pyrocausal.structural import LINKS, Equations, allowed_edges, interventional_order, mechanism_shift, topological_order

ORDERED = 0.4  # share of the training after which the order of the programs is final, where it is to be found
SETTLED = 0.7  # share of the training after which programs are not rescaled any more


class TargetTable(nn.Module):
    """q(target, penetrance) of every perturbation, kept by its sufficient statistics.

    ``observe`` folds the programs of a minibatch into running sums over the cells of each perturbation (forgetting about twice an epoch);
    ``update`` is the closed form above. Where cells carry two perturbations, each sees what the others leave (a damped step each time).
    """

    targets: Tensor | None
    gram: Tensor
    cross: Tensor
    cross_link: Tensor
    seen: Tensor
    logits: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, n_perturbations: int, n_latent: int, targets: Tensor | None) -> None:
        super().__init__()
        shape = (n_perturbations, n_latent)
        self.register_buffer("targets", targets)
        self.register_buffer("gram", torch.zeros(n_perturbations, n_perturbations))
        self.register_buffer("cross", torch.zeros(shape))
        self.register_buffer("cross_link", torch.zeros(shape))
        self.register_buffer("seen", torch.zeros(n_perturbations))
        self.register_buffer("logits", torch.zeros(shape))
        self.register_buffer("loc", torch.ones(shape))
        self.register_buffer("scale", torch.ones(shape))

    def expected(self) -> Tensor:
        """E[c_p t_p], [P, D]."""
        t = self.logits.softmax(-1) if self.targets is None else self.targets
        return t * self.loc

    @torch.no_grad()
    def total_effects(self) -> tuple[Tensor, Tensor]:
        """Mean change of program k per unit of shift of program j, [D, D], and the precision of each row, [D]."""
        t = self.logits.softmax(-1) if self.targets is None else self.targets
        dose = t * self.loc  # [P, D], shift of program j by perturbation p
        precision = (self.gram.diagonal()[:, None] * dose.square()).sum(0)
        return dose.T @ self.cross / precision.clamp_min(1e-6)[:, None], precision

    @torch.no_grad()
    def observe(self, dose: Tensor, u: Tensor, link: Any) -> None:
        """Fold in programs ``u`` [n, D] of cells treated with ``dose`` [n, P]."""
        n_p = self.gram.diagonal()
        weight = dose.square().sum(0)
        rate = (2 * weight / n_p.clamp_min(1)).clamp(max=1)
        rate = torch.maximum(rate, torch.where(weight > 0, weight / (weight + self.seen), 0.0))[:, None]
        scale = (n_p / weight.clamp_min(1e-6))[:, None]
        self.cross += rate * (scale * (dose.T @ u) - self.cross)
        self.cross_link += rate * (scale * (dose.T @ link(u)) - self.cross_link)
        self.seen += weight

    @torch.no_grad()
    def scale_programs(self, s: Tensor) -> None:
        """``u_k -> s_k u_k`` for a link that commutes with a positive scale."""
        for statistic in (self.cross, self.cross_link):
            statistic *= s
        self.loc *= s

    @torch.no_grad()
    def update(self, graph: Tensor, log_prior: Tensor | None, m: Tensor, tau: Tensor, step: float = 1.0) -> None:
        """The closed form, given the network [D, D] and the prior: log-probabilities of targets [P, D], mean and sd of
        penetrances [D]."""
        n_p = self.gram.diagonal()
        others = (self.gram - torch.diag(n_p)) @ self.expected()
        r = self.cross - self.cross_link @ graph - others
        precision = n_p[:, None] + tau**-2
        loc = (r + m / tau**2) / precision
        if self.targets is None:
            assert log_prior is not None
            log_evidence = 0.5 * (precision * loc**2 - (m / tau) ** 2) - 0.5 * precision.log() - tau.log()
            self.logits.copy_((log_prior + log_evidence).log_softmax(-1))
        self.loc += step * (loc - self.loc)
        self.scale.copy_(precision.rsqrt())


class SCCVAE(PyroModule):
    """The abducting guide; arguments as the model's. ``encoder_layers=0`` is a linear encoder."""

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 16,
        targets: Any = None,
        graph: Any = "full",
        edge_prior: EdgePrior = "laplace",
        equations: Equations = "linear",
        likelihood: LikelihoodName = "negative_binomial",
        own_genes: Sequence[int] | None = None,
        n_hidden: int = 128,
        encoder_layers: int = 2,
        n_batches: int = 1,
    ) -> None:
        super().__init__()
        self.equations = equations
        self.n_batches = n_batches
        given = None if targets is None else torch.as_tensor(targets, dtype=torch.get_default_dtype())
        self.table = TargetTable(n_perturbations, n_latent, given)
        learned = isinstance(graph, str) and graph == "free"
        allowed = allowed_edges(n_latent, graph)
        self.edges = EdgePosterior(edge_index(allowed), n_latent, edge_prior, learned)
        self.register_buffer("order", None if learned else torch.tensor(topological_order(allowed)))
        self.has_own = any(g >= 0 for g in own_genes or ())
        self.own_loc = nn.Parameter(torch.zeros(n_perturbations), requires_grad=self.has_own)
        self.own_log_scale = nn.Parameter(torch.full((n_perturbations,), -1.0), requires_grad=self.has_own)
        self.learning_rates = {"edge_logits": 10.0} if edge_prior == "spike_slab" else {}  # slow at the networks' own rate
        self.standardise = Standardise(n_genes, log=likelihood != "gaussian")
        self.encoder = Encoder(n_genes + (n_batches if n_batches > 1 else 0), n_latent, n_hidden, encoder_layers)
        self.register_buffer("moment", torch.zeros(n_latent))  # sum of E[z^2] over the epoch's cells
        self.register_buffer("cells", torch.zeros(()))
        self.settled = SETTLED

    def forward(self, batch: Batch) -> None:
        table = self.table
        t = table.targets
        if t is None:
            t = pyro.sample("mask", dist.OneHotCategorical(logits=table.logits).to_event(1))
        c = pyro.sample("penetrance", dist.Normal((t * table.loc).sum(-1), (t * table.scale).sum(-1)).to_event(1))
        A, order = self.edges()
        if self.has_own:
            pyro.sample("own_effect", dist.Normal(self.own_loc, self.own_log_scale.exp()).to_event(1))
        if batch.x is None:
            return
        with batch.cells():
            a, v = self.encode(batch)
            self.last_programs = batch, a.detach(), v.detach()
            S = mechanism_shift(batch.dose, t * c[..., None])
            pyro.sample("z", Abducted(a, v, A, S, self.equations, self.order if order is None else order))

    moment: Tensor
    cells: Tensor

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the programs of each cell, [n, D] each."""
        assert batch.x is not None
        h = self.standardise(batch.x)
        if self.n_batches > 1:
            h = torch.cat([h, nn.functional.one_hot(batch.batch_code, self.n_batches).to(h.dtype)], -1)
        return self.encoder(h)

    # -- training --------------------------------------------------------------------------------------------------------------

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Before the first epoch: moments of the expression, and axes along what the perturbations do."""
        device = self.table.loc.device
        x = torch.as_tensor(data.dense(), device=device)
        self.standardise.fit_moments(x)
        dose = data.dose.astype("float64")
        self.table.gram.copy_(torch.as_tensor((dose.T @ dose).toarray(), device=device))
        moment_start(self, model, x, torch.as_tensor(data.dose.toarray(), device=device), torch.as_tensor(data.library_size, device=device))

    def after_step(self, model: Any, batch: Batch, progress: float) -> None:
        """After every optimiser step: targets and penetrances in closed form."""
        seen, a, v = self.last_programs
        assert seen is batch
        with torch.no_grad():
            u = a if self.equations == "linear" else a + v * torch.randn_like(v)
            self.table.observe(batch.dose, u, LINKS[self.equations])
            self.refresh(model, step=0.5)
            law = Abducted(a, v, self.edges.mean(), mechanism_shift(batch.dose, self.table.expected()), self.equations)
            self.moment += law.second_moment().sum(0)
            self.cells += len(batch)

    def after_epoch(self, model: Any, progress: float) -> None:
        """After every epoch: programs in units of their exogenous standard deviation, which gradients alone reach slowly."""
        if self.equations != "softplus" and progress <= SETTLED:
            self.rescale(model, (self.moment / self.cells).sqrt())
        if self.edges.priority is not None and ORDERED / 2 <= progress <= ORDERED:  # without edges until then, refined while it is young
            self.edges.set_order(interventional_order(*self.table.total_effects()))
        self.moment.zero_()
        self.cells.zero_()

    @torch.no_grad()
    def absorb(self, model: Any, cells: Iterable[Batch], known: Tensor, sweeps: int) -> None:
        """Fold in cells of perturbations without any so far; rows that are ``known`` [P] stay as they are."""
        table, link = self.table, LINKS[self.equations]
        seen = torch.zeros(3, len(known), dtype=table.loc.dtype, device=table.loc.device)
        for batch in cells:
            a, v = self.encode(batch)
            if self.has_own:
                seen += _own_gene_totals(model, batch, a)
            u = a if self.equations == "linear" else a + v * torch.randn_like(v)
            table.gram += batch.dose.T @ batch.dose
            table.cross += batch.dose.T @ u
            table.cross_link += batch.dose.T @ link(u)
        frozen = {k: getattr(table, k).clone() for k in ("logits", "loc", "scale")}
        alone = bool((table.gram == torch.diag(table.gram.diagonal())).all())  # then one pass is exact
        for _ in range(1 if alone else sweeps):
            self.refresh(model, step=1.0 if alone else 0.5)
            for k, before in frozen.items():
                rows = known.reshape(-1, *([1] * (before.dim() - 1)))
                getattr(table, k).copy_(torch.where(rows, before, getattr(table, k)))
        if self.has_own:
            self._absorb_own(model, seen, (seen[0] > 0) & ~known)

    @torch.no_grad()
    def _absorb_own(self, model: Any, seen: Tensor, new: Tensor) -> None:
        """q(h) of new perturbations from their cells' own genes: the normal posterior of what is measured there against what is expected.

        Counts: ``log(observed / expected)`` of the totals, with the variance of an overdispersed count; otherwise the mean residual.
        """
        n, observed, expected = seen
        m, s = model.own_loc, model.own_log_scale.exp()
        gene = torch.zeros_like(new, dtype=torch.int64)
        gene[model.own[0]] = model.own[1]
        if model.likelihood.is_counts:
            found = ((observed + 0.5) / (expected + 0.5)).log()
            theta = model.likelihood.log_theta.exp()[gene] if model.likelihood.name == "negative_binomial" else torch.inf
            variance = 1 / (observed + 0.5) + 1 / (n.clamp_min(1) * theta)
        else:
            found = (observed - expected) / n.clamp_min(1)
            variance = model.likelihood.sigma[gene] ** 2 / n.clamp_min(1)
        precision = 1 / variance + s**-2
        self.own_loc.copy_(torch.where(new, (found / variance + m / s**2) / precision, self.own_loc))
        self.own_log_scale.copy_(torch.where(new, -0.5 * precision.log(), self.own_log_scale))

    @torch.no_grad()
    def rescale(self, model: Any, s: Tensor) -> None:
        """``u_k -> u_k / s_k`` in encoder, network, table and decoder at once: the decoder sees what it saw, and ``E[z_k^2]`` becomes 1.

        Exact for links that commute with a positive scale (identity, relu), and maximises the bound over s.
        """
        self.encoder.scale(1 / s)
        model.decoder.scale(s)
        self.edges.rescale(s)
        model.penetrance_loc.div_(s)
        model.penetrance_log_scale.sub_(s.log())
        self.table.scale_programs(1 / s)

    @torch.no_grad()
    def refresh(self, model: Any, step: float = 1.0) -> None:
        """Targets and penetrances from the present statistics, network and prior."""
        log_prior = None if self.table.targets is not None else model.target_log_probs()
        self.table.update(self.edges.mean(), log_prior, model.penetrance_loc, model.penetrance_log_scale.exp(), step)


class SCCVAEParity(PyroModule):
    """The paper's guide: control cells are encoded. Without partners (queries) the cells themselves are: ask about control cells."""

    def __init__(self, n_genes: int, n_latent: int = 512, n_hidden: int = 1024) -> None:
        super().__init__()
        self.encoder = MLP(n_genes, n_hidden, n_hidden, 1)
        self.mu = nn.Linear(n_hidden, n_latent)
        self.log_v = nn.Linear(n_hidden, n_latent)

    def forward(self, batch: Batch) -> None:
        x = batch.partner if batch.partner is not None else batch.x
        if x is None:
            return
        with batch.cells():
            h = nn.functional.leaky_relu(self.encoder(x), 0.2)
            v = self.log_v(h).exp() + 1e-4
            pyro.sample("z", dist.Normal(self.mu(h), v.sqrt()).to_event(1))


def _own_gene_totals(model: Any, batch: Batch, a: Tensor) -> Tensor:
    """Of the cells of each perturbation: how many, and their own gene's observed and expected total without its own effect, [3, P]."""
    assert batch.x is not None
    eta = model.decoder(a)
    if len(model.batch_offset) > 1:
        eta = eta + of_batch(model.batch_offset, batch.batch_code)
    perturbation, gene = model.own
    dose = batch.dose[:, perturbation]
    expected = model.likelihood.mean(eta, batch.library_size)
    out = torch.zeros(3, batch.dose.shape[1], dtype=a.dtype, device=a.device)
    for row, value in zip(out, (torch.ones_like(dose), batch.x[:, gene], expected[:, gene]), strict=True):
        row[perturbation] = (dose * value).sum(0)
    return out
