"""Scores of perturbed cells by denoising score matching, and the law that a score stands for.

For states z in units of the spread of all cells about the mean of the controls, noise levels sigma from 10 to 0.01, condition q with dose
vector, and noise eps ~ Normal(0, I), the network and its loss are those of Lorch et al. 2026 (arXiv 2601.15341)::

    E_q = dose @ e                                                 e [P, n_embed]: a row for each perturbation
    x   = y / sqrt(1 + sigma^2),                                   y = z + sigma eps
    h1  = tanh(W1 x + T(k) + B1 E_q),   h2 = tanh(W2 h1 + B2 E_q),   F = W3 h2
    s   = (x - sigma F - y) / sigma^2
    L   = E 1/(2 d) |sigma s + eps|^2

T embeds the level k by sines and cosines and two dense layers. :class:`LCDStationary` is the law whose score s is: samples by the
probability flow, and log-probabilities as an unbiased estimate of a lower bound (Song, Durkan, Murray and Ermon 2021)::

    log p(z) >= -H(Normal(z, s_1^2 I), Normal(m, (1 + s_1^2) I)) - A E[|sigma s + eps|^2] + d A,   log sigma ~ Uniform, A = log(s_1 / s_0)

with s_1, s_0 the largest and smallest level and m the mean that the network itself gives at s_1. The bound is about z with noise of s_0
added, and is exact if s is the score of a law whose marginal at s_1 is that normal.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from tqdm import tqdm

from pyrocausal.dynamics.samplers import annealed_langevin, ladder, probability_flow
from pyrocausal.errors import DataError, PyrocausalError

if TYPE_CHECKING:
    from pyrocausal.data import PerturbationData

Source = Callable[[Tensor, torch.Generator], Tensor]  # codes of conditions [n] -> states [n, d]
PAIRS = 16  # antithetic pairs of particles of a mean


class ScoreNetwork(nn.Module):
    """The score of every condition at every noise level, and the units of the states.

    Args:
        n_genes, n_perturbations: d and P.
        n_hidden: width, even. n_layers: hidden layers. n_embed: length of a perturbation's embedding.
        n_levels, largest, smallest: the ladder of noise levels, in standardised units.
    """

    sigmas: Tensor
    discrete: Tensor
    frequencies: Tensor
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_hidden: int = 1024,
        n_layers: int = 2,
        n_embed: int = 1024,
        n_levels: int = 30,
        largest: float = 10.0,
        smallest: float = 0.01,
    ) -> None:
        super().__init__()
        if n_hidden < 4 or n_hidden % 2 or n_layers < 1:
            raise PyrocausalError(
                f"n_hidden={n_hidden} and n_layers={n_layers} were given; the width is even, from 4, and there is a layer"
            )
        self.n_levels, self.largest, self.smallest = n_levels, largest, smallest
        self.embedding = nn.Parameter(0.01 * torch.randn(n_perturbations, n_embed))
        self.layers = nn.ModuleList(_dense(n_genes if i == 0 else n_hidden, n_hidden) for i in range(n_layers))
        self.inject = nn.ModuleList(_dense(n_embed, n_hidden) for _ in range(n_layers))
        self.time = nn.Sequential(_dense(n_hidden, n_hidden), nn.Tanh(), _dense(n_hidden, n_hidden))
        self.out = _dense(n_hidden, n_genes)
        self.register_buffer("sigmas", ladder(n_levels, largest, smallest).float())
        self.register_buffer("frequencies", torch.exp(-math.log(n_levels) * torch.arange(n_hidden // 2) / (n_hidden // 2 - 1)))
        self.register_buffer("discrete", torch.zeros((), dtype=torch.bool))  # whether it was trained on the levels alone
        self.register_buffer("centre", torch.zeros(n_genes))
        self.register_buffer("scale", torch.ones(n_genes))

    @property
    def span(self) -> float:
        """log(largest / smallest)."""
        return math.log(self.largest / self.smallest)

    def sigma(self, k: Tensor) -> Tensor:
        """Noise at a position of the ladder (0 the largest; fractions between levels)."""
        return self.largest * torch.exp(k.to(self.centre.dtype) * (-self.span / (self.n_levels - 1)))

    def body(self, y: Tensor, k: Tensor, dose: Tensor) -> Tensor:
        """F, [..., d]; y [..., d] is standardised, k broadcasts to [...], dose [..., P]."""
        x = y / (1 + self.sigma(k).square()).sqrt()[..., None]
        dose = dose.to(y.dtype)
        few = dose[..., 0].numel() < len(self.embedding)
        E = dose @ self.embedding if few else None
        h = x
        inject: Any
        for i, (layer, inject) in enumerate(zip(self.layers, self.inject, strict=True)):
            injected = inject(E) if E is not None else dose @ (self.embedding @ inject.weight.T) + inject.bias
            h = layer(h) + injected + (self._time(k) if i == 0 else 0.0)
            h = h.tanh()
        return self.out(h)

    def _time(self, k: Tensor) -> Tensor:
        levels = torch.arange(self.n_levels, device=k.device) if not k.is_floating_point() else k
        angle = levels[..., None] * self.frequencies
        embedded = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        return embedded if k.is_floating_point() else embedded[k]

    def forward(self, y: Tensor, k: Tensor | float, dose: Tensor) -> Tensor:
        """The score at noise level k, in standardised units, [..., d]."""
        k = k if isinstance(k, Tensor) else torch.tensor(k, dtype=y.dtype, device=y.device)
        sigma = self.sigma(k)[..., None].to(y.dtype)
        return -_pull(sigma) * y - self.body(y, k, dose) / sigma

    def residual(self, z: Tensor, eps: Tensor, k: Tensor, dose: Tensor) -> Tensor:
        """``sigma s(z + sigma eps) + eps``, [..., d]: what score matching makes small."""
        sigma = self.sigma(k)[..., None].to(z.dtype)
        y = z + sigma * eps
        return eps - sigma * _pull(sigma) * y - self.body(y, k, dose)

    def standardised(self, x: Tensor) -> Tensor:
        """States in standardised units."""
        return (x - self.centre) / self.scale

    @torch.no_grad()
    def fit_units(self, source: Source, doses: Tensor, generator: torch.Generator, n: int = 2000) -> None:
        """Centre: mean of the controls (of all, if there are none); scale: standard deviation of all conditions, each of equal weight."""
        q = torch.arange(len(doses)).repeat_interleave(n)
        x = source(q, generator).reshape(len(doses), n, -1)
        control = (doses == 0).all(-1)
        mean = x.mean(1)
        self.centre.copy_(mean[control].mean(0) if bool(control.any()) else mean.mean(0))
        sd = x.flatten(0, 1).std(0)
        self.scale.copy_(torch.where(sd > 0, sd, torch.ones_like(sd)))

    @torch.no_grad()
    def fill_untrained(self, seen: Tensor) -> None:
        """Perturbations that no cell had (``seen`` [P] false) get the mean embedding of the others."""
        if bool(seen.any()) and not bool(seen.all()):
            self.embedding[~seen] = self.embedding[seen].mean(0)

    # -- in the units of the data --------------------------------------------------------------------------------------------------

    def drift(self, x: Tensor, dose: Tensor) -> Tensor:
        """The drift at the smallest level, diffusion sqrt(2) I in the units of x, [..., d]; x [..., d], dose [..., P]."""
        return self(self.standardised(x), float(self.n_levels - 1), dose) / self.scale

    def limit(self, dose: Tensor, n_steps: int = 500) -> Tensor:
        """Where the noise-free annealed dynamics settle from the centre, [K, d]; dose [K, P].

        Args:
            n_steps: at each level; 500 as published. With fewer the steps are longer, and cover the same time.
        """
        start = torch.zeros(*dose.shape[:-1], len(self.centre), dtype=self.centre.dtype, device=self.centre.device)
        z = annealed_langevin(lambda z, k: self(z, k, dose), start, self.sigmas, n_steps, step=5.0 / n_steps, noise=False)
        return self.centre + self.scale * z


def _dense(n_in: int, n_out: int) -> nn.Linear:
    """Variance 1 / n_in, truncated at two standard deviations; no bias at first."""
    layer = nn.Linear(n_in, n_out)
    sd = n_in**-0.5 / 0.87962566
    nn.init.trunc_normal_(layer.weight, std=sd, a=-2 * sd, b=2 * sd)
    nn.init.zeros_(layer.bias)
    return layer


def _pull(sigma: Tensor) -> Tensor:
    """``(1 - 1 / r) / sigma^2`` with ``r = sqrt(1 + sigma^2)``, without the cancellation."""
    r = (1 + sigma.square()).sqrt()
    return 1 / (r * (r + 1))


def dsm_loss(network: ScoreNetwork, z: Tensor, dose: Tensor, generator: torch.Generator | None = None, continuous: bool = False) -> Tensor:
    """``1/(2 d) |sigma s + eps|^2``, mean over rows; z [n, d] standardised, dose [n, P].

    Args:
        continuous: log sigma uniform between the ends of the ladder; otherwise a level of it at random, as published.
    """
    k = _levels(network, z.shape[:-1], generator, continuous)
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
    return 0.5 * network.residual(z, eps, k, dose).square().mean()


def _levels(network: ScoreNetwork, shape: torch.Size, generator: torch.Generator | None, continuous: bool) -> Tensor:
    device, n = network.sigmas.device, network.n_levels
    if continuous:
        return torch.rand(shape, generator=generator, device=device) * (n - 1)
    return torch.randint(n, shape, generator=generator, device=device)


# -- training --------------------------------------------------------------------------------------------------------------------


def from_cells(states: Tensor, codes: Tensor, n_conditions: int) -> Source:
    """States of cells, drawn with replacement within their conditions.

    Args:
        states: [n, d]. codes: condition of each, [n] int64.

    Raises:
        DataError: if a condition has no cell.
    """
    size = torch.bincount(codes, minlength=n_conditions)
    if bool((size == 0).any()):
        raise DataError(f"condition {int((size == 0).nonzero()[0])} has no cells; leave it out")
    order, first = torch.argsort(codes, stable=True), size.cumsum(0) - size

    def draw(q: Tensor, generator: torch.Generator) -> Tensor:
        within = (torch.rand(q.shape, generator=generator, dtype=torch.float64) * size[q]).long()
        return states[order[first[q] + within]]

    return draw


def conditions_of(data: PerturbationData) -> tuple[Tensor, Tensor]:
    """Condition of each cell, [n_cells] int64, and the doses of the conditions, [Q, P]."""
    _, first, codes = np.unique(data.labels.astype(str), return_index=True, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), torch.from_numpy(data.dose[first].toarray().astype(np.float32))


def train_score(
    network: ScoreNetwork,
    source: Source,
    doses: Tensor,
    *,
    steps: int = 50_000,
    batch_size: int = 8192,
    lr: float = 1e-3,
    weight_decay: float = 1.0,
    parity: bool = False,
    continuous: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Fit the network to states by denoising score matching (AdamW, cosine to 0); its units are to be set first (``fit_units``).

    Args:
        source: draws states of conditions, in the units of the data (:func:`from_cells`, or a generator's).
        doses: of the conditions, [Q, P].
        parity: as published: one condition per step, and weight decay on the embeddings too. Otherwise every row of a batch has a
            condition of its own, and embeddings do not decay (those of perturbations outside a batch would).
        seed: of batches, levels and noise; the same seed gives the same network bit for bit.

    Returns:
        The running loss, a row for each of up to 200 stretches of the training: ``loss``, ``seconds``. An interrupt (Ctrl-C) keeps what was
        fitted; the attribute ``stopped`` of the table says so.
    """
    generator = torch.Generator().manual_seed(seed)
    decaying = [p for n, p in network.named_parameters() if parity or n != "embedding"]
    groups = [{"params": decaying, "weight_decay": weight_decay}]
    groups += [] if parity else [{"params": [network.embedding], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    device = network.sigmas.device
    noise = generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)
    Q, table = len(doses), doses.to(device)
    rows: list[dict[str, float]] = []
    every, total, count, stopped = max(1, steps // 200), torch.zeros((), device=device), 0, "max_steps"
    bar = tqdm(total=steps, desc="score", unit="step", disable=not (sys.stderr.isatty() if progress is None else progress))
    network.train()
    network.discrete.fill_(not continuous)
    start = time.perf_counter()
    try:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            q = torch.randint(Q, (1 if parity else batch_size,), generator=generator).expand(batch_size)
            z = network.standardised(source(q, generator).to(device, network.scale.dtype))
            loss = dsm_loss(network, z, table[q.to(device)], noise, continuous)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total, count = total + loss.detach(), count + 1
            if (step + 1) % every == 0 or step + 1 == steps:
                rows.append({"step": step + 1, "loss": float(total) / count, "seconds": time.perf_counter() - start})
                total, count = torch.zeros_like(total), 0
                bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}")
            bar.update()
    except KeyboardInterrupt:
        stopped = "interrupted"
    bar.close()
    network.fill_untrained((doses != 0).any(0).to(device))
    network.eval()
    history = pd.DataFrame(rows, columns=["step", "loss", "seconds"]).set_index("step")
    history.attrs["stopped"] = stopped
    return history


# -- the law ---------------------------------------------------------------------------------------------------------------------


class LCDStationary(TorchDistribution):
    """Cells at the stationary state of a non-linear diffusion, known by its score; a vector over genes, in the units of the data.

    Args:
        network: the score and the units.
        dose: treatment, [..., n, P].
        probes: draws of noise and level behind each log-probability. Levels are stratified over the cells of a batch, and a control
            variate, exact for standard normal states, takes most of the noise out.

    ``sample`` follows the probability flow from the largest level and adds the noise of the smallest, of which ``log_prob`` is a bound.
    ``mean`` averages ends of the flow from fixed antithetic starts; it is exact for normal laws.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, network: ScoreNetwork, dose: Tensor, probes: int = 1, validate_args: bool | None = None) -> None:
        self.network, self.dose, self.probes = network, dose, probes
        super().__init__(dose.shape[:-1], network.centre.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LCDStationary:
        return LCDStationary(self.network, self.dose.expand(*batch_shape, self.dose.shape[-1]), self.probes, validate_args=False)

    @property
    def _top(self) -> float:
        """Standard deviation of the normal law that the flow starts from."""
        return math.sqrt(1 + self.network.largest**2)

    def _start(self, dose: Tensor) -> Tensor:
        """Its mean: the mean of the clean state seen from itself through the largest noise, in two rounds from 0; [..., d]."""
        z = self.network.centre.new_zeros(*dose.shape[:-1], *self.event_shape)
        for _ in range(2):
            z = z + self.network.largest**2 * self.network(z, 0.0, dose)
        return z

    def _flow(self, z: Tensor, dose: Tensor) -> Tensor:
        return probability_flow(lambda y, k: self.network(y, k, dose), z, self.network.sigmas)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        network, dose = self.network, self.dose
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        z = self._start(dose) + self._top * torch.randn(shape, dtype=network.centre.dtype, device=network.centre.device)
        z = self._flow(z, dose)
        return network.centre + network.scale * (z + network.smallest * torch.randn_like(z))

    @cached_property
    def _mean(self) -> Tensor:
        rows, which = torch.unique(self.dose.reshape(-1, self.dose.shape[-1]), dim=0, return_inverse=True)
        generator = torch.Generator().manual_seed(0)
        noise = self._top * torch.randn(PAIRS, 1, *self.event_shape, generator=generator).to(self.network.centre)
        with torch.no_grad():
            z = self._flow(self._start(rows) + torch.cat([noise, -noise]), rows).mean(0)
        return (self.network.centre + self.network.scale * z)[which].reshape(self._extended_shape())

    @property
    def mean(self) -> Tensor:
        return self._mean

    def log_prob(self, value: Tensor) -> Tensor:
        """An unbiased estimate of the bound, [..., n], in nats; differentiable in value and network."""
        network, d = self.network, self.event_shape[0]
        z = network.standardised(value)
        shape = torch.broadcast_shapes(z.shape[:-1], self.batch_shape)
        z = z.expand(*shape, d)
        with torch.no_grad():
            start = self._start(self.dose)
        top2 = self._top**2
        cross = 0.5 * d * math.log(2 * math.pi * top2) + ((z - start).square().sum(-1) + d * network.largest**2) / (2 * top2)
        total = torch.zeros_like(cross)
        for _ in range(self.probes):
            k = self._stratified(shape)
            eps = torch.randn_like(z)
            sigma = network.sigma(k)
            control = (eps.square().sum(-1) - d - 2 * sigma * (eps * z).sum(-1)) / (1 + sigma.square()).square()
            total = total + network.residual(z, eps, k, self.dose).square().sum(-1) - control
        return -cross - network.span * (total / self.probes - d) - network.scale.log().sum()

    def _stratified(self, shape: torch.Size) -> Tensor:
        """Positions on the ladder, uniform for each cell, one in each n-th part of it; whole levels if the network knows no others."""
        n, network = (shape[-1] if shape else 1), self.network
        uniform = torch.rand(shape, dtype=network.centre.dtype, device=network.centre.device)
        place = (torch.rand_like(uniform).argsort(-1) + uniform) / n if shape else uniform
        if bool(network.discrete):
            return (place * network.n_levels).long().clamp(max=network.n_levels - 1)
        return place * (network.n_levels - 1)

    @torch.no_grad()
    def carry(self, value: Tensor, new: LCDStationary) -> Tensor:
        """The same cells, had they had another dose, [..., n, d]: back along the flow of one law to its noise, and forth along the other's.

        Exact transport between the two laws; that a cell keeps this noise is an assumption of the model, which no data can test.
        """
        network, dose = self.network, self.dose
        last = network.n_levels - 1
        z = probability_flow(lambda y, k: network(y, last - k, dose), network.standardised(value), network.sigmas.flip(0))
        noise = z - self._start(dose)
        moved = new._flow(new._start(new.dose) + noise, new.dose) - self._flow(z, dose)  # rounding of the steps cancels
        return value + network.scale * moved


__all__ = ["LCDStationary", "ScoreNetwork", "conditions_of", "dsm_loss", "from_cells", "train_score"]
