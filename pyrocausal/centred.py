"""The centred guide of shift models: an encoder for the programs themselves, and a closed-form table for what moved them.

For every model with ``u = z + dose @ (mask * effect)``, ``z ~ Normal(0, I)``::

    q(mask, effect)            closed form, :class:`~pyrocausal.sparsity.SpikeSlabTable`
    q(z_n | x_n, mask, effect) = Normal(a(x_n) - dose_n @ (mask * effect), diag v(x_n))

so that ``u_n = a(x_n) + noise`` whatever the table says: the encoder looks for programs in the cell, the table explains them, and neither
chases the other. Training has two phases, by progress through the epochs:

1. until the first of ``turns``: the mask is held on (the span of the programs is found);
2. then the programs are turned to the axes that make the table sparsest, in guide and decoder at once; from here on mask and effect are
   inferred together, and the later ``turns`` mend what the sparse phase has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocausal.data import PerturbationData
from pyrocausal.errors import PyrocausalError
from pyrocausal.loading import Batch
from pyrocausal.nn import MLP, Standardise
from pyrocausal.sparsity import SpikeSlabTable, sparse_rotation
from pyrocausal.structural import mechanism_shift

TURNS = (0.5, 0.65, 0.8)


class CentredGuide(PyroModule):
    """Encoder, table, and the turn. Subclasses add the sites that come before the mask (:meth:`prior_sites`).

    Args:
        dense: the model's mask is fixed to ones: no ``mask`` site, no turn.
        turns: shares of the training after which the programs are turned; the mask is inferred from the first on.
    """

    def __init__(
        self,
        n_genes: int,
        n_perturbations: int,
        n_latent: int,
        table: SpikeSlabTable,
        counts: bool,
        dense: bool,
        n_hidden: int,
        n_layers: int,
        n_batches: int,
        turns: Sequence[float],
    ) -> None:
        super().__init__()
        self.dense = dense
        self.turns = tuple(turns)
        self.settled = max(turns, default=0.0)
        self.n_batches = n_batches
        self.table = table
        self.register_buffer("turned", torch.zeros((), dtype=torch.int64))
        self.standardise = Standardise(n_genes, log=counts)
        self.encoder = MLP(n_genes + (n_batches if n_batches > 1 else 0), 2 * n_latent, n_hidden, n_layers, layer_norm=True)
        nn.init.zeros_(self.encoder.last.bias)

    # -- the guide ---------------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> None:
        self.prior_sites()
        table, slab = self.table, self.table.effect_scale
        mask = torch.ones_like(table.loc) if self.dense else pyro.sample("mask", dist.Bernoulli(logits=table.logits).to_event(2))
        scale = mask * table.scale + (1 - mask) * slab  # an effect without target follows its prior
        effect = pyro.sample("effect", dist.Normal(mask * table.loc, scale).to_event(2))
        if batch.x is None:
            return
        with batch.cells():
            a, v = self.encode(batch)
            self.last_programs = batch, a.detach()  # for after_step, which would have to encode again
            pyro.sample("z", dist.Normal(a - mechanism_shift(batch.dose, mask * effect), v).to_event(1))

    def prior_sites(self) -> None:
        """Sample the sites above the mask; none here."""

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the programs ``u`` of each cell, [n, D] each."""
        assert batch.x is not None
        h = self.standardise(batch.x)
        if self.n_batches > 1:
            h = torch.cat([h, nn.functional.one_hot(batch.batch_code, self.n_batches).to(h.dtype)], -1)
        a, log_v = self.encoder(h).chunk(2, -1)
        return a, log_v.exp()

    # -- training --------------------------------------------------------------------------------------------------------------

    def initialise(self, model: Any, data: PerturbationData) -> None:
        """Before the first epoch: moments of the expression, base rates of the decoder, the Gram matrix of the doses."""
        for name in ("mask_probability", "effect_scale"):
            ours, theirs = (float(getattr(m, name, torch.nan)) for m in (self.table, model))
            if abs(ours - theirs) > 1e-6:
                raise PyrocausalError(f"the guide has {name}={ours:.3g} and the model {theirs:.3g}; give both the same, as pc.build does")
        device = self.table.loc.device
        x = torch.as_tensor(data.dense(), device=device)
        self.standardise.fit_moments(x)
        model.likelihood.bound(x)
        with torch.no_grad():
            counts = model.likelihood.is_counts
            model.decoder.last.bias.copy_((x.sum(0) / x.sum()).clamp_min(1e-8).log() if counts else x.mean(0))
            if not counts:
                model.likelihood.log_sigma.copy_(x.std(0).clamp_min(1e-3).log())
        dose = data.dose.astype("float64")
        self.table.set_gram(torch.as_tensor((dose.T @ dose).toarray(), dtype=self.table.gram.dtype, device=device))

    def after_step(self, model: Any, batch: Batch, progress: float) -> None:
        """After every optimiser step: fold the minibatch into the table; turn the programs when it is time."""
        seen, a = self.last_programs
        assert seen is batch
        self._warm_up(progress)
        self.table.observe(batch.dose, a)
        self._share_prior(model)

    def after_epoch(self, model: Any, progress: float) -> None:
        """After every epoch; ``progress`` is the share of the epochs that are done."""
        due = sum(progress >= at - 1e-9 for at in self.turns)
        if self.dense or due <= int(self.turned):
            return
        self.turned.fill_(due)
        self._warm_up(progress)
        self.turn(model, sparse_rotation(self.table.means(), local=due > 1))
        self.table.sparse()
        self._share_prior(model)

    def _share_prior(self, model: Any) -> None:
        """The model has the prior that the table learned."""
        for name, learned in zip(("mask_probability", "effect_scale"), self.table.learns, strict=True):
            if learned:
                getattr(model, name).copy_(getattr(self.table, name))

    def _warm_up(self, progress: float) -> None:
        """The sparsity prior comes in between the first turn and the last, so that targets are not lost before the axes are right."""
        first, last = min(self.turns, default=0.0), self.settled
        self.table.prior_weight = min(1.0, max(0.0, (progress - first) / max(last - first, 1e-9)))

    @torch.no_grad()
    def absorb(self, model: Any, cells: Iterable[Batch], known: Tensor, sweeps: int) -> None:
        """Fold in cells of perturbations without any so far; rows that are ``known`` [P] stay as they are."""
        table = self.table
        gram = table.gram.clone()
        for batch in cells:
            gram += batch.dose.T @ batch.dose
            table.cross += batch.dose.T @ self.encode(batch)[0]
        table.set_gram(gram)
        frozen = {k: getattr(table, k).clone() for k in ("logits", "loc", "scale")}
        blur, leak = table.blur.clone(), table.leak.clone()  # learned from the training set; the new cells are judged by it
        for _ in range(sweeps):
            table.update()
            table.blur.copy_(blur)
            table.leak.copy_(leak)
            for k, before in frozen.items():
                getattr(table, k).copy_(torch.where(known[:, None], before, getattr(table, k)))

    @torch.no_grad()
    def turn(self, model: Any, rotation: Tensor) -> None:
        """Turn the programs by an orthogonal R: ``a -> a R``, ``W -> W R``, and the decoder reads ``u R'``, so that it sees what it saw."""
        n = self.table.loc.shape[1]
        head = self.encoder.last
        head.weight[:n] = rotation.T @ head.weight[:n]
        head.bias[:n] = head.bias[:n] @ rotation
        head.weight[n:] = (rotation**2).T @ head.weight[n:]  # log-scales: first order
        head.bias[n:] = (rotation**2).T @ head.bias[n:]
        first = model.decoder.first
        first.weight.copy_(first.weight @ rotation)
        self.table.rotate(rotation)
