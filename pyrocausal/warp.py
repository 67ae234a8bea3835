"""An exact bijection between expression and numbers of which the leading k are programs: for latents without an encoder's slack.

    x -> c = (x - centre) axes / scale  (principal components; the first k go on, the rest are Gaussian noise)
      -> y = S_B(... S_1(c K_1) K_2 ...) K_{B+1}        S: a monotone rational spline for each coordinate, K: invertible matrices

so that the density of x is that of y times a product of slopes and determinants. Splines are those of Durkan et al. 2019 (Neural spline
flows, with linear rational pieces, Dolatabadi et al. 2020), of ``pyro.distributions.transforms``; beyond +-``BOUND`` they are the identity.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.transforms import Spline
from torch import Tensor, nn
from torch.distributions import constraints

BOUND = 5.0  # of the splines, in standard deviations
PIECES = 12


class Warp(nn.Module):
    """Float64; the identity on the principal components at first.

    Args:
        n_genes: G. n_latent: k, at most G. n_layers: splines.
    """

    centre: Tensor
    axes: Tensor
    scale: Tensor
    splines: Any

    def __init__(self, n_genes: int, n_latent: int, n_layers: int = 2) -> None:
        super().__init__()
        self.k = n_latent
        eye = torch.eye(n_genes, dtype=torch.float64)
        self.register_buffer("centre", torch.zeros(n_genes, dtype=torch.float64))
        self.register_buffer("axes", eye)  # columns
        self.register_buffer("scale", torch.ones(n_genes, dtype=torch.float64))
        self.splines = nn.ModuleList(Spline(n_latent, count_bins=PIECES, bound=BOUND, order="linear").double() for _ in range(n_layers))
        for spline in self.splines:  # nearly the identity
            for p in spline.parameters():
                nn.init.zeros_(p)
        self.matrices = nn.ParameterList([nn.Parameter(eye[:n_latent, :n_latent].clone()) for _ in range(n_layers + 1)])

    @torch.no_grad()
    def fit_components(self, x: Tensor) -> None:
        """Principal components of cells [n, G], and a random turn before the first spline."""
        self.centre.copy_(x.mean(0))
        _, spread, axes = torch.linalg.svd(x - self.centre, full_matrices=len(x) < x.shape[1])
        scale = torch.full_like(self.scale, float(spread[-1])).index_copy(0, torch.arange(len(spread)), spread) / len(x) ** 0.5
        self.axes.copy_(axes.T)
        self.scale.copy_(scale.clamp_min(1e-6 * scale[0]))
        turn = torch.linalg.qr(torch.randn(self.k, self.k, dtype=x.dtype))[0]
        self.matrices[0].copy_(turn)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expression [..., G] to coordinates y [..., G] and ``log |dy / dx|`` [...]."""
        c = (x - self.centre) @ self.axes / self.scale
        y, rest = c[..., : self.k], c[..., self.k :]
        slope = torch.linalg.slogdet(self.matrices[0])[1] - self.scale.log().sum()
        y = y @ self.matrices[0]
        log_det = torch.zeros_like(y[..., 0])
        for spline, K in zip(self.splines, list(self.matrices)[1:], strict=True):
            bent = spline(y)
            log_det = log_det + spline.log_abs_det_jacobian(y, bent).sum(-1)
            y = bent @ K
            slope = slope + torch.linalg.slogdet(K)[1]
        return torch.cat([y, rest], -1), log_det + slope

    def inverse(self, y: Tensor) -> Tensor:
        """Coordinates [..., G] to expression."""
        c, rest = y[..., : self.k], y[..., self.k :]
        for spline, K in zip(reversed(self.splines), reversed(list(self.matrices)[1:]), strict=True):
            c, _ = spline.spline_op(c @ torch.linalg.inv(K), inverse=True)
        return (torch.cat([c @ torch.linalg.inv(self.matrices[0]), rest], -1) * self.scale) @ self.axes.T + self.centre


class Warped(TorchDistribution):
    """The law of ``x = warp^-1(y)``, of y with the law ``base``: event [G], or [F, G].

    ``mean`` is where the mean of y lies, which is the median along every coordinate before the last turn, not the mean of x.

    Args:
        seen: which of the F rows of an event count, [n, F].
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: Any, warp: Warp, seen: Tensor | None = None) -> None:
        self.base, self.warp, self.seen = base, warp, seen
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.warp.inverse(self.base.mean)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.warp.inverse(self.base.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        y, log_det = self.warp(value.to(self.warp.scale.dtype))
        if len(self.event_shape) > 1:
            log_det = (log_det if self.seen is None else log_det * self.seen).sum(-1)
        return self.base.log_prob(y) + log_det

    def expand(self, batch_shape: Any, _instance: Any = None) -> Warped:
        return self if torch.Size(batch_shape) == self.batch_shape else Warped(self.base.expand(batch_shape), self.warp, self.seen)

    def carry(self, value: Tensor, new: Warped) -> Tensor:
        """The same residual of y in another world."""
        old, now = self.base.base_dist, new.base.base_dist
        y, _ = self.warp(value.to(old.loc.dtype))
        return self.warp.inverse(y + (now.loc - old.loc) + (now.scale - old.scale) * (y - old.loc) / old.scale)


__all__ = ["Warp", "Warped"]
