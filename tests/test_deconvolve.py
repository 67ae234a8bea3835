"""Deconvolution of counts: the network and the loss by hand, the published optimiser, recovery of simulated counts, and the two stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

import pyrocausal as pc
from pyrocausal.data import PerturbationData
from pyrocausal.dynamics import deconvolve as module
from pyrocausal.dynamics.deconvolve import Deconvolution, Generators, deconvolve, evidence
from pyrocausal.dynamics.score import conditions_of
from pyrocausal.dynamics.two_stage import fit_two_stage
from pyrocausal.errors import DataError, PyrocausalError
from pyrocausal.guides.lcd import LCD as Guide
from pyrocausal.models.lcd import LCD
from pyrocausal.simulate_sde import linear_sde_screen
from pyrocausal.zero_inflated import ZeroInflatedPoisson, unit_scaling

torch.set_num_threads(1)
SMALL = {"n_noise": 8, "width": 8, "n_blocks": 2, "wide": 12, "n_wide": 1}


def generators(n_conditions: int = 3, d: int = 5) -> Generators:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Generators(n_conditions, d, **SMALL)


def by_hand(net: Generators, q: int, x: Tensor) -> Tensor:
    """One condition, one noise vector, one layer at a time."""

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ net.weight[name][q] + net.bias[name][q, 0]

    x = dense(x, "first")
    x = x + dense(silu(dense(x, "block0a")), "block0b")
    x = x + dense(silu(dense(x, "block1a")), "block1b")
    x = dense(x, "genes")
    return x + dense(silu(dense(x, "wide0a")), "wide0b")


def test_every_condition_has_its_own_network() -> None:
    net = generators()
    for bias in net.bias.values():
        torch.nn.init.normal_(bias.data, generator=torch.Generator().manual_seed(1))
    eps = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    out = net(eps, net.rows(torch.tensor([2, 0])))
    for i, q in enumerate((2, 0)):
        torch.testing.assert_close(out[i], torch.stack([by_hand(net, q, e) for e in eps[i]]), rtol=1e-5, atol=1e-6)
    q = torch.tensor([2, 0, 2, 2, 0])
    states = net.states(q, torch.Generator().manual_seed(3))
    noise = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))  # conditions 0 and 2, at most 3 of one
    expected = [by_hand(net, 2, noise[1, 0]), by_hand(net, 0, noise[0, 0]), by_hand(net, 2, noise[1, 1]), by_hand(net, 2, noise[1, 2])]
    torch.testing.assert_close(states, torch.stack([*expected, by_hand(net, 0, noise[0, 1])]), rtol=1e-5, atol=1e-6)


def test_evidence() -> None:
    """tau = 1 is the log of the mean likelihood; a large tau the mean log-likelihood; the correction is the second-order one."""
    l = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3  # noqa: E741
    torch.testing.assert_close(evidence(l), l.exp().mean(-1).log())
    torch.testing.assert_close(evidence(l, (1e7,)), l.mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evidence(l, (1.0, 5.0)), (evidence(l) + 5 * (l / 5).exp().mean(-1).log()) / 2)
    w = (l / 5).exp()
    correction = 5 * w.var(-1) / w.mean(-1) ** 2 / 100
    torch.testing.assert_close(evidence(l, (5.0,), debias=True) - evidence(l, (5.0,)), correction)


def test_correction_takes_away_the_bias() -> None:
    """Mean over 20,000 sets of 20 log-normal weights: Jensen's bias -.0126 falls to a tenth; standard error of each mean .001."""
    g = torch.Generator().manual_seed(0)
    l = 0.7 * torch.randn(20_000, 20, generator=g, dtype=torch.float64)  # noqa: E741
    exact = 0.7**2 / 2
    plain, corrected = (float(evidence(l, (1.0,), debias=b).mean()) - exact for b in (False, True))
    assert plain < -0.01 and abs(corrected) < 0.005


def screen(n: int = 300, d: int = 6, seed: int = 0) -> tuple[PerturbationData, Tensor, Tensor, Tensor]:
    """Counts of three conditions with normal states; the truth: unit, gate, means of counts by condition."""
    import anndata as ad
    import pandas as pd

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean = torch.tensor([[1.0] * d, [1.0, 3.0] * (d // 2), [2.5, 1.0, 0.0] * (d // 3)])
        code = torch.arange(3).repeat_interleave(n)
        state = mean[code] + 0.6 * torch.randn(3 * n, d)
        unit, gate = torch.linspace(3, 9, d), torch.linspace(0.05, 0.3, d)
        x = ZeroInflatedPoisson(unit * softplus(state), gate).sample()
    labels = np.array(["control", "A", "B"])[code.numpy()]
    adata = ad.AnnData(x.numpy(), obs=pd.DataFrame({"perturbation": labels}, index=[f"c{i}" for i in range(3 * n)]))
    adata.var_names = [f"g{i}" for i in range(d)]
    return PerturbationData.from_anndata(adata), unit, gate, x


def run(data: PerturbationData, unit: Tensor, steps: int, seed: int = 0, **settings: object) -> Deconvolution:
    settings = {"mc_samples": 40, "cells": 16, "lr": 3e-3, **SMALL, **settings}
    return deconvolve(data, conditions_of(data)[0], unit, steps=steps, seed=seed, progress=False, **settings)  # type: ignore[arg-type]


def test_optimiser_is_adam_over_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps of torch's AdamW (b1 = 0, b2 = .99) over all conditions at once, gradients of the others zero, clipped at norm 1."""
    data, unit, _, _ = screen(n=20)
    seen: list[tuple[Tensor, ...]] = []
    real = module.pairwise_zip

    def spy(y: Tensor, rate: Tensor, gate: Tensor) -> Tensor:
        seen.append((y,))
        return real(y, rate, gate)

    monkeypatch.setattr(module, "pairwise_zip", spy)
    out = run(data, unit, 20, warmup=5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Generators(3, 6, **SMALL)
        gate = torch.randn(6).requires_grad_()
    optimiser = torch.optim.AdamW([*net.parameters(), gate], lr=3e-3, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
    g = torch.Generator().manual_seed(0)
    for step, (y,) in enumerate(seen, 1):
        q = int(torch.randint(3, (), generator=g))
        torch.rand((16,), generator=g, dtype=torch.float64)  # the cells, which were spied
        eps = torch.randn(1, 40, 8, generator=g)
        rows = {f"{kind}.{k}": v[q : q + 1] for kind in ("weight", "bias") for k, v in getattr(net, kind).items()}
        rate = unit * softplus(net(eps, rows)[0])
        loss = -evidence(real(y, rate, gate.sigmoid()), (1.0, 20.0)).mean()
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.nn.utils.clip_grad_norm_([*net.parameters(), gate], 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 5) / 15))
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 5) * cosine
        optimiser.step()
    torch.testing.assert_close(out.gate_logits, gate.detach(), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(out.generators.named_parameters(), net.parameters(), strict=True):
        # where a gradient is rounding noise, Adam's step is its sign
        assert float((a - b).abs().gt(1e-4).float().mean()) < 0.01, name


@pytest.mark.slow
def test_deconvolved_counts_are_those_of_the_cells() -> None:
    """Means of the decoded counts of every condition and gene within 5 % of the cells' (their standard error is 2 %), after 3,000 steps."""
    data, _, _, _ = screen(n=600)
    codes, _ = conditions_of(data)
    unit = unit_scaling(torch.as_tensor(data.select("control").dense()))
    out = run(data, unit, 3000, mc_samples=300, cells=64, taus=(1.0, 5.0))
    states = out.source(torch.arange(3).repeat_interleave(20_000), torch.Generator().manual_seed(1)).reshape(3, 20_000, -1)
    decoded = (unit * softplus(states) * (1 - out.gate_logits.sigmoid())).mean(1)
    cells = torch.stack([torch.as_tensor(data.dense())[codes == q].mean(0) for q in range(3)])
    assert float((decoded / cells - 1).abs().max()) < 0.05
    assert out.history["loss"].iloc[-1] < out.history["loss"].iloc[0] - 2


def test_seed_and_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    data, unit, _, _ = screen(n=20)
    before = torch.random.get_rng_state()
    a, b, c = run(data, unit, 12), run(data, unit, 12), run(data, unit, 12, seed=1)
    assert torch.equal(a.gate_logits, b.gate_logits) and not torch.equal(a.gate_logits, c.gate_logits)
    assert all(torch.equal(p, q) for p, q in zip(a.generators.parameters(), b.generators.parameters(), strict=True))
    assert torch.equal(before, torch.random.get_rng_state())
    calls, real = [0], module.pairwise_zip

    def stop(y: Tensor, rate: Tensor, gate: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return real(y, rate, gate)

    monkeypatch.setattr(module, "pairwise_zip", stop)
    stopped = run(data, unit, 200)
    assert stopped.history.attrs["stopped"] == "interrupted" and len(stopped.history) == 7
    assert not torch.equal(stopped.gate_logits, run(data, unit, 0 + 1).gate_logits)


# -- both stages -------------------------------------------------------------------------------------------------------------------


@pytest.mark.longest
def test_two_stages_answer_as_a_fit_does() -> None:
    """Counts: effects of singles and of a pair correlate with the change of the cells' means at .95 or more, from both stages."""
    adata = linear_sde_screen(8, 3, degree=2, cells_per_perturbation=200, n_control=400, doubles=1, counts=True, library_size=300.0, seed=0)
    data = PerturbationData.from_anndata(adata)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, guide = LCD(*data.sizes, depth=False, n_hidden=64, n_embed=16), Guide(*data.sizes, depth=False)
    fit = fit_two_stage(
        model, guide, data, steps_1=1500, mc_samples=200, taus=(1.0, 5.0), lr_1=3e-3, steps_2=2500, batch_size=512, lr_2=3e-3,
        weight_decay=0.1, encoder_epochs=10, progress=False,
    )  # fmt: skip
    perturbed = [c for c in data.conditions if c != "control"]
    effect = pc.effects(fit, perturbed, draws=30, units="counts")["effect"].mean("draw").to_numpy()
    cells = np.array([data.select(c).dense().mean(0) - data.select("control").dense().mean(0) for c in perturbed])
    assert np.corrcoef(effect.ravel(), cells.ravel())[0, 1] > 0.95
    assert bool(model.network.discrete) and all(p.requires_grad for p in model.network.parameters())
    assert np.isfinite(fit.history["elbo"]).all() and fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0]
    assert set(fit.settings["stages"]) == {"deconvolution", "score"}
    moved = pc.counterfactual(fit, data.select("control")[:5], perturbed[0], draws=2, noise="mean")
    assert np.isfinite(moved["effect"].to_numpy()).all()


def test_two_stages_of_states_and_refusals() -> None:
    adata = linear_sde_screen(6, 2, degree=2, cells_per_perturbation=150, seed=0)
    data = PerturbationData.from_anndata(adata)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"likelihood": "gaussian"}
        model, guide = LCD(*data.sizes, **settings, n_hidden=64, n_embed=16), Guide(*data.sizes, **settings)
    fit = fit_two_stage(model, guide, data, steps_2=2000, batch_size=512, lr_2=3e-3, weight_decay=0.1, progress=False)
    truth = adata.uns["truth"]
    names, exact = list(truth["conditions"][1:]), truth["means"][1:] - truth["means"][0]
    effect = pc.effects(fit, names, draws=2)["effect"].mean("draw").to_numpy()
    assert np.linalg.norm(effect - exact) / np.linalg.norm(exact) < 0.15
    with pytest.raises(DataError, match="normalised"):
        deconvolve(data, conditions_of(data)[0], torch.ones(6), steps=1)
    with pytest.raises(PyrocausalError, match="depth=True"):
        fit_two_stage(LCD(*data.sizes), Guide(*data.sizes), data)
