"""SCCVAE: shift interventions through a learned latent network (Liu, Zhang and Uhler, PLOS Comput Biol 2026, bioRxiv 2025.06.05.657988).

A perturbation p shifts the program that it targets, with a penetrance; a network of programs carries the shift on; cells that nothing was
done to are the same model without a shift. :class:`SCCVAE` is the model that the paper's claims need::

    e_p in R^E                                             embedding of perturbation p, known for unseen ones too
    t_p   ~ OneHot(softmax(W e_p + w)),  W ~ Normal(0, 1)  the program that p targets             p = 1..P, D programs
    c_p   ~ Normal(m_k, tau_k^2) where t_p = k             penetrance: how far it moves it
            m_k ~ Normal(0, 3^2), tau_k^2 ~ InverseGamma(2, 1)        what is usual for the program; point estimates
    A_jk  ~ Laplace(0, b)   (or another edge prior)        network, edge j -> k
    z_n   ~ Normal(0, I_D)                                 exogenous state of cell n
    S_n   = sum_p dose_np c_p t_p
    u_nk  = z_nk + S_nk + sum_j f(u_nj) A_jk               f = identity, relu or softplus
    h_p   ~ Normal(m_h, s_h^2)                             what p does to the transcript of its own gene, where that is measured
    x_n   ~ NB(mean = library_n softmax(d(u_n) + own_n), theta)     or Poisson, or Normal(d(u_n) + own_n, sigma^2);
            own_ng = sum_p dose_np h_p 1[g is the gene of p]

=================  ===============  =============  =====================================================================
site               shape            kind           meaning
=================  ===============  =============  =====================================================================
``mask``           [P, D]           sample         t, the target of each perturbation (deterministic if it is given)
``penetrance``     [P]              sample         c, in standard deviations of the exogenous state
``own_effect``     [P]              sample         h, on the scale of the decoder's output; only if some p has its gene measured
``effect``         [P, D]           deterministic  c_p in every column, so that ``mask * effect`` is the shift of p
``graph_weight``   [E]              sample         weight of each possible edge (and ``edge``, ``graph_scale``, ``priority``)
``graph``          [D, D]           deterministic  A
``dose``           [n, P]           deterministic  the treatment
``z``              [n, D]           sample         exogenous state (what is abducted)
``shift``          [n, D]           deterministic  S
``clamp``          [n, D]           deterministic  hard intervention on programs; NaN = untouched
``u``              [n, D]           deterministic  programs, after the network
``x_loc``          [n, G]           deterministic  expected expression
``x``              [n, G]           observed       expression
``target_prior``, ``penetrance_prior``  factors    log p(W); log p(m, tau)
=================  ===============  =============  =====================================================================

A guide acts on its own gene directly (it is cut, or not transcribed), not through a program; without h the programs would have to bend to
that one gene, and an unseen perturbation would leave its own transcript alone.

A linear map with a prior, not the paper's network: there are as many examples as perturbations, tens to hundreds, and on 48 of them even
a linear map memorises without the prior (logistic regression on 30 simulated sets of embeddings, held-out log-probability of the target:
-2.1 with it, -3.9 almost without).

The penetrance belongs to the target: ``flip_target`` also takes the penetrance to what is usual for the new program.

**Identified.** Effects of measured perturbations, doses and combinations, with any decoder. With linear equations and a decoder that is
free to start with a linear layer, ``(I - A)^-1`` folds into the decoder: no edge and no clamp is identified, only shifts are. Edges and
clamps need one of: ``decoder="anchored"`` (each program owns genes), or ``equations="relu"`` (or softplus) with ``decoder="linear"`` (up to
permutation and scale). ``pc.identifiability(fit)`` does the fold and says which holds. **Not identified:** the order of programs from
control cells alone; interactions beyond the equations.

**Parity.** :class:`SCCVAEParity` is the published model and objective, in the paper's terms (n = D nodes, G genes; w the weights)::

    t_p = softmax(g(e_p)),  S^p = c_p t_p,  A = B * M strictly upper triangular,  U^p = (Z + S^p) (I - A)^-1
    L   = 1/4 MSE(x^, x) + MSE(y^, y) + beta mean KL(q(z|x) || N(0, I)) + 10 MMD(y^, y)          per batch of one perturbation

where x are control cells, z ~ q(z | x), x^ = d(U^0), and y are other cells, of the perturbation, y^ = d(U^p) with the same z. Multiplied
by cells x n it is a bound with fixed noise ``sigma = sqrt(G / (2 w n))`` and a factor; those are the sites ``x_control``, ``x`` and
``discrepancy`` below. Only control cells are ever encoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.discrepancy import TRAINING_BANDWIDTHS, mmd
from pyrocausal.edges import EdgePrior, edge_index, sample_graph
from pyrocausal.elbo import ELBO
from pyrocausal.likelihood import Likelihood, LikelihoodName
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, DecoderKind, Loadings, of_batch
from pyrocausal.structural import Equations, allowed_edges, longest_path, mechanism_shift, solve, topological_order


class SCCVAE(PyroModule):
    """The generative program.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent: number of programs D.
        embedding: e, [P, E], standardised by column here; None for no knowledge (targets are free a priori, unseen ones not told apart).
        targets: program of each perturbation [P, D], one-hot, if it is known; None to learn it.
        graph: which edges may be: ``"full"`` (j -> k for j < k), ``"free"`` (both ways, the order is found), ``"none"``, ``"random"``, or
            a matrix [D, D].
        edge_prior: ``"laplace"``, ``"normal"``, ``"horseshoe"`` or ``"spike_slab"``, of scale b (learned).
        equations: f, ``"linear"``, ``"relu"`` or ``"softplus"``.
        decoder: ``"mlp"``, ``"linear"`` or ``"anchored"``; see :class:`pyrocausal.nn.Loadings`.
        anchors: genes that each program owns, [D, G], for the anchored decoder.
        likelihood: ``"negative_binomial"``, ``"poisson"`` or ``"gaussian"``; ``noise_floor`` bounds sigma from below.
        own_genes: column of each perturbation's own gene, -1 where it is not measured; ``pc.build`` finds them by name. None: no h.
        n_batches: technical batches; more than one adds an offset per batch and gene.
    """

    embedding: Tensor | None
    embedding_mean: Tensor
    embedding_scale: Tensor
    targets: Tensor | None
    own: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 16,
        embedding: Any = None,
        targets: Any = None,
        graph: Any = "full",
        edge_prior: EdgePrior = "laplace",
        equations: Equations = "linear",
        decoder: DecoderKind = "mlp",
        anchors: Any = None,
        likelihood: LikelihoodName = "negative_binomial",
        noise_floor: float = 0.0,
        own_genes: Sequence[int] | None = None,
        n_hidden: int = 128,
        n_layers: int = 2,
        n_batches: int = 1,
    ) -> None:
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        self.answers_unseen = embedding is not None
        dtype = torch.get_default_dtype()
        e = None if embedding is None else torch.as_tensor(embedding, dtype=dtype)
        self.register_buffer("embedding", e)
        if self.embedding is not None and len(self.embedding) != n_perturbations:
            raise ValueError(f"an embedding of {len(self.embedding)} rows was given for {n_perturbations} perturbations; give one for each")
        self.register_buffer("targets", None if targets is None else torch.as_tensor(targets, dtype=dtype))
        self.target_encoder = None
        if targets is None and self.embedding is not None:
            sd = self.embedding.std(0, unbiased=False)
            self.register_buffer("embedding_mean", self.embedding.mean(0))
            self.register_buffer("embedding_scale", torch.where(sd > 1e-12, sd, torch.ones_like(sd)))
            self.target_encoder = nn.Linear(self.embedding.shape[1], n_latent)
            nn.init.zeros_(self.target_encoder.weight)
            nn.init.zeros_(self.target_encoder.bias)
        self.penetrance_loc = nn.Parameter(torch.zeros(n_latent))
        self.penetrance_log_scale = nn.Parameter(torch.zeros(n_latent))
        own = [(p, g) for p, g in enumerate(own_genes or ()) if g >= 0]
        self.register_buffer("own", torch.tensor(own).T.contiguous() if own else None)  # [2, M]: perturbations, their genes
        self.own_loc = nn.Parameter(torch.zeros(()), requires_grad=bool(own))
        self.own_log_scale = nn.Parameter(torch.zeros(()), requires_grad=bool(own))
        allowed = allowed_edges(n_latent, graph)
        self.learned_order = isinstance(graph, str) and graph == "free"
        self.register_buffer("edge_index", edge_index(allowed))
        self.depth = n_latent - 1 if self.learned_order else longest_path(allowed)
        backward = bool(allowed.tril().any()) and not self.learned_order  # a given graph whose programs are not numbered causes first
        self.register_buffer("order", torch.tensor(topological_order(allowed)) if backward else None)
        self.edge_prior = edge_prior
        self.edge_log_scale = nn.Parameter(torch.tensor(-1.0))
        self.equations = equations
        anchors = None if anchors is None else torch.as_tensor(anchors)
        self.decoder = Loadings(decoder, n_latent, n_genes, anchors, n_hidden, n_layers)
        self.batch_offset = nn.Parameter(torch.zeros(n_batches, n_genes), requires_grad=n_batches > 1)
        self.likelihood = Likelihood(likelihood, n_genes, noise_floor)

    def target_log_probs(self) -> Tensor:
        """log softmax(W e_p + w): log-probability of each program to be the target of each perturbation, [P, D]."""
        if self.target_encoder is None:
            return torch.zeros(self.shape, dtype=self.edge_log_scale.dtype, device=self.edge_log_scale.device).log_softmax(-1)
        assert self.embedding is not None
        return self.target_encoder((self.embedding - self.embedding_mean) / self.embedding_scale).log_softmax(-1)

    def forward(self, batch: Batch) -> Tensor:
        table = {"event_dims": ("perturbation", "latent")}
        programs = {"event_dims": ("latent",)}
        n_latent = self.shape[1]
        if self.targets is None:
            t = pyro.sample("mask", dist.OneHotCategorical(logits=self.target_log_probs()).to_event(1), infer=table)
            if self.target_encoder is not None:
                pyro.factor("target_prior", -0.5 * self.target_encoder.weight.square().sum())
        else:
            t = pyro.deterministic("mask", self.targets, event_dim=2)
        m, tau = self.penetrance_loc, self.penetrance_log_scale.exp()
        spread = torch.where(t.sum(-1) > 0, (t * tau).sum(-1), 1.0)  # without a target (flip_target) it moves nothing anyway
        law = dist.Normal((t * m).sum(-1), spread).to_event(1)
        c = pyro.sample("penetrance", law, infer={"event_dims": ("perturbation",)})
        pyro.factor("penetrance_prior", (-0.5 * (m / 3) ** 2 - 6 * self.penetrance_log_scale - tau**-2).sum())
        effect = pyro.deterministic("effect", c[..., None].expand(*c.shape, n_latent), event_dim=2)
        A, order = sample_graph(self.edge_index, n_latent, self.edge_prior, self.edge_log_scale.exp(), learned_order=self.learned_order)
        if self.order is not None:
            order = self.order
            pyro.deterministic("priority", order.argsort().to(m.dtype), event_dim=1)
        if self.own is not None:
            law = dist.Normal(self.own_loc.expand(self.shape[:1]), self.own_log_scale.exp()).to_event(1)
            h = pyro.sample("own_effect", law, infer={"event_dims": ("perturbation",)})
        untouched = torch.full_like(m, math.nan)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, torch.ones_like(m)).to_event(1), infer=programs)
            shift = pyro.deterministic("shift", mechanism_shift(dose, t * effect), event_dim=1)
            clamp = pyro.deterministic("clamp", untouched, event_dim=1)
            clamp = None if clamp is untouched else clamp
            u = pyro.deterministic("u", solve(z + shift, A, self.equations, clamp, order, self.depth), event_dim=1)
            eta = self.decoder(u)
            if self.own is not None:
                eta = eta.index_add(-1, self.own[1], (dose * h)[..., self.own[0]])
            if len(self.batch_offset) > 1:
                eta = eta + of_batch(self.batch_offset, batch.batch_code)
            x_loc = pyro.deterministic("x_loc", self.likelihood.mean(eta, batch.library_size), event_dim=1)
            return pyro.sample("x", self.likelihood(x_loc, batch.nonzeros), obs=batch.x, infer={"event_dims": ("gene",)})


class SCCVAEParity(PyroModule):
    """The published model and objective; fit it with ``objective="parity", batch_size=32, lr=5e-4, kl_warmup=1.0``.

    Args:
        n_genes, n_perturbations: sizes of the screen.
        n_latent: nodes n (512 in the paper).
        embedding: [P, E] (50 components in the paper); None for one-hot.
        graph: ``"full"``, ``"none"`` (the paper's "conditional"), ``"random"``, or a matrix [n, n] (the paper's "causal").
        n_hidden: width of the two hidden layers of every network.
        w_control, w_perturbed, w_discrepancy: weights of the objective.
    """

    data_kind: ClassVar = "normalised"
    batching: ClassVar = "condition"  # a minibatch is cells of one condition, with as many random control cells beside them
    embedding: Tensor
    mask: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int = 512,
        embedding: Any = None,
        graph: Any = "full",
        n_hidden: int = 1024,
        w_control: float = 0.25,
        w_perturbed: float = 1.0,
        w_discrepancy: float = 10.0,
    ) -> None:
        super().__init__()
        e = torch.eye(n_perturbations) if embedding is None else torch.as_tensor(embedding, dtype=torch.get_default_dtype())
        self.register_buffer("embedding", e)
        allowed = allowed_edges(n_latent, graph)
        if allowed.tril().any():
            raise ValueError(
                "the graph has edges against the numbering of the nodes; number them from causes to effects, as the paper does"
            )
        self.register_buffer("mask", allowed.to(e.dtype))
        self.answers_unseen = embedding is not None
        self.shape = (n_perturbations, n_latent)
        self.shift_encoder = MLP(e.shape[1], n_latent, n_hidden, 2)
        self.c = nn.Parameter(torch.ones(n_perturbations))
        self.B = nn.Parameter(0.1 * torch.randn(n_latent, n_latent))
        self.decoder = MLP(n_latent, n_genes, n_hidden, 2)
        self.w_discrepancy = w_discrepancy
        self.sigma_control = math.sqrt(n_genes / (2 * w_control * n_latent))
        self.sigma_perturbed = math.sqrt(n_genes / (2 * w_perturbed * n_latent))

    def parity_objective(self) -> ELBO:
        """``cells x n x L`` but for constants, with the KL in closed form."""
        return ELBO()

    def forward(self, batch: Batch) -> Tensor:
        n = self.shape[1]
        t = pyro.deterministic("mask", self.shift_encoder(self.embedding).softmax(-1), event_dim=2)
        c = pyro.deterministic("penetrance", self.c, event_dim=1)
        effect = pyro.deterministic("effect", c[..., None].expand(*c.shape, n), event_dim=2)
        A = pyro.deterministic("graph", self.B * self.mask, event_dim=2)
        untouched = torch.full_like(c[..., 0], math.nan).expand(n)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, torch.ones_like(c[..., 0]).expand(n)).to_event(1), infer={"event_dims": ("latent",)})
            S = pyro.deterministic("shift", mechanism_shift(dose, t * effect), event_dim=1)
            clamp = pyro.deterministic("clamp", untouched, event_dim=1)
            u = pyro.deterministic("u", solve(z + S, A, clamp=None if clamp is untouched else clamp), event_dim=1)
            y = pyro.deterministic("x_loc", self.decoder(u), event_dim=1)
            out = pyro.sample("x", dist.Normal(y, self.sigma_perturbed).to_event(1), obs=batch.x, infer={"event_dims": ("gene",)})
            if batch.partner is not None:
                x = self.decoder(solve(z, A))
                pyro.sample("x_control", dist.Normal(x, self.sigma_control).to_event(1), obs=batch.partner)
        if batch.partner is not None and batch.x is not None and self.w_discrepancy > 0:
            cells = len(batch)
            with poutine.scale(scale=batch.n_total / cells):
                distance = mmd(y, batch.x, TRAINING_BANDWIDTHS, unbiased=False)
                pyro.factor("discrepancy", -self.w_discrepancy * n * cells * distance)
        return out
