"""The discrepancy VAE: from single perturbations to pairs through a latent graph (Zhang et al., NeurIPS 2023, arXiv 2307.06250).

The predecessor of SCCVAE, with its published objective (CMVAE in its code). Only control cells x are encoded; perturbed cells y are
matched in law, not one by one::

    b_p  = softmax(T g(onehot_p))                          target of perturbation p among n nodes, T the temperature
    s_p                                                    its strength
    z    ~ Normal(0, I_n)
    U^p  : u_k = z_k + b_pk s_p + sum_j f(u_j) G_jk        G strictly upper triangular; a pair adds both shifts
    x^   = d(U^0),   y^ = d(U^p)                           the same z
    L    = alpha MMD(y^, y) + MSE(x^, x) + beta KL(q(z|x) || N(0, I)) + lambda ||G||_1         KL summed over nodes, mean over cells

Multiplied by cells / beta this is a bound with fixed noise ``sigma = sqrt(G beta / 2)`` (G genes) on control cells, a factor for the
discrepancy, and one for the sparsity. alpha and T grow as in the reference: alpha is 0 for a twentieth of the training, then rises to its
value at half; T is 1 for a twentieth, then rises to 5. ``fit(kl_warmup=(0.1, 1.0))`` is the reference's schedule of beta.

==================  ===============  =============  ======================================================
site                shape            kind           meaning
==================  ===============  =============  ======================================================
``mask``            [P, n]           deterministic  b, the soft target of each perturbation
``penetrance``      [P]              deterministic  s
``effect``          [P, n]           deterministic  s_p in every column
``graph``           [n, n]           deterministic  G
``dose``            [cells, P]       deterministic  the treatment
``z``               [cells, n]       sample         exogenous state
``shift``           [cells, n]       deterministic  shift of the nodes
``clamp``           [cells, n]       deterministic  hard intervention on nodes; NaN = untouched
``u``               [cells, n]       deterministic  nodes, after the graph
``x_loc``           [cells, G]       deterministic  expected expression
``x``               [cells, G]       observed       expression (of no weight where the discrepancy stands for it)
``x_control``       [cells, G]       observed       the control cells beside them
``discrepancy``, ``sparsity``        factors        terms of the objective
==================  ===============  =============  ======================================================

**Identified.** As :mod:`pyrocausal.models.sccvae`: with linear equations and a free decoder shifts only, not the graph. With ``f = relu``
and a linear decoder the graph is identified in principle, but this objective does not find it (its published fit of its own toy chain has
no edge above .07 where the truth is 1): use SCCVAE with the abducting guide.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.discrepancy import TRAINING_BANDWIDTHS, mmd
from pyrocausal.elbo import ELBO
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP
from pyrocausal.structural import Equations, mechanism_shift, solve


class DiscrepancyVAE(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent: nodes (the number of perturbations in the paper's predictions, 7 in its interpretable graph).
        targets: node of each perturbation [P, n], one-hot, if it is known (the ``order`` of the reference's toy).
        equations: f, ``"linear"`` (the paper's) or ``"relu"`` (its toy).
        n_hidden: width of the hidden layer of every network; 0 for linear ones (its toy).
        alpha, beta, sparsity: weights of the objective at the end of their schedules; ``sparsity`` is lambda.
    """

    data_kind: ClassVar = "normalised"
    batching: ClassVar = "condition"
    targets: Tensor | None
    progress: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int | None = None,
        targets: Any = None,
        equations: Equations = "linear",
        n_hidden: int = 128,
        alpha: float = 10.0,
        beta: float = 2.0,
        sparsity: float = 1e-3,
    ) -> None:
        super().__init__()
        n = n_perturbations if n_latent is None else n_latent
        self.shape = (n_perturbations, n)
        self.equations = equations
        self.alpha, self.beta, self.sparsity = alpha, beta, sparsity
        self.register_buffer("targets", None if targets is None else torch.as_tensor(targets, dtype=torch.get_default_dtype()))
        self.target_encoder = MLP(n_perturbations, n, max(n_hidden, 1), int(n_hidden > 0)) if targets is None else None
        self.strength = nn.Parameter(torch.ones(n_perturbations))
        self.G = nn.Parameter(0.1 * torch.randn(n, n))
        self.decoder = MLP(n, n_genes, max(n_hidden, 1), int(n_hidden > 0))
        self.leaky_output = n_hidden > 0
        self.sigma = math.sqrt(n_genes * beta / 2)
        self.register_buffer("progress", torch.ones(()))  # share of the training that is done, set by the guide

    def parity_objective(self) -> ELBO:
        """``cells / beta x L`` but for constants, with the KL in closed form."""
        return ELBO()

    def decode(self, u: Tensor) -> Tensor:
        """d(u), [..., n] -> [..., G]; the reference has a leaky ReLU on the output too."""
        out = self.decoder(u)
        return nn.functional.leaky_relu(out, 0.2) if self.leaky_output else out

    def forward(self, batch: Batch) -> Tensor:
        n_perturbations, n = self.shape
        b = self.targets
        if b is None:
            assert self.target_encoder is not None
            T = 1 + 4 * ((self.progress - 0.05) / 0.95).clamp(0, 1)
            b = (T * self.target_encoder(torch.eye(n_perturbations, dtype=self.G.dtype, device=self.G.device))).softmax(-1)
        b = pyro.deterministic("mask", b, event_dim=2)
        s = pyro.deterministic("penetrance", self.strength, event_dim=1)
        effect = pyro.deterministic("effect", s[..., None].expand(*s.shape, n), event_dim=2)
        G = pyro.deterministic("graph", self.G.triu(1), event_dim=2)
        untouched = torch.full_like(s[..., 0], math.nan).expand(n)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, torch.ones_like(s[..., 0]).expand(n)).to_event(1), infer={"event_dims": ("latent",)})
            shift = pyro.deterministic("shift", mechanism_shift(dose, b * effect), event_dim=1)
            clamp = pyro.deterministic("clamp", untouched, event_dim=1)
            u = pyro.deterministic("u", solve(z + shift, G, self.equations, None if clamp is untouched else clamp), event_dim=1)
            y = pyro.deterministic("x_loc", self.decode(u), event_dim=1)
            training = batch.partner is not None and batch.x is not None
            with poutine.mask(mask=not training):  # no cell of y belongs to a cell of y^
                out = pyro.sample("x", dist.Normal(y, self.sigma).to_event(1), obs=batch.x, infer={"event_dims": ("gene",)})
            if training:
                x = self.decode(solve(z, G, self.equations))
                pyro.sample("x_control", dist.Normal(x, self.sigma).to_event(1), obs=batch.partner)
        if batch.partner is not None and batch.x is not None:
            alpha = self.alpha * ((self.progress - 0.05) / 0.45).clamp(0, 1)
            with poutine.scale(scale=batch.n_total / self.beta):
                pyro.factor("discrepancy", -alpha * mmd(y, batch.x, TRAINING_BANDWIDTHS, unbiased=False))
                pyro.factor("sparsity", -self.sparsity * G.abs().sum())
        return out
