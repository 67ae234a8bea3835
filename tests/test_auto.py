"""Guides made from the model."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam

import pyrocausal as pc
from pyrocausal.structural import mechanism_shift


@pytest.fixture(scope="module")
def data():
    adata = pc.simulate.svae_screen(n_perturbations=10, n_latent=4, cells_per_perturbation=60, n_genes=30, n_control=80, seed=0)
    return pc.PerturbationData.from_anndata(adata)


class Linear(PyroModule):
    """A linear Gaussian factor model of log expression with a positive scale per perturbation and cells that escape."""

    def __init__(self, n_genes, n_perturbations, n_latent=3):
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        self.loadings = PyroParam(0.1 * torch.randn(n_latent, n_genes))
        self.bias = PyroParam(torch.zeros(n_genes))

    def forward(self, batch):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand(self.shape).to_event(2))
        penetrance = pyro.sample("penetrance", dist.Beta(5.0, 1.0).expand(self.shape[:1]).to_event(1))
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            hit = pyro.sample("hit", dist.Bernoulli(penetrance).to_event(1))
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(self.shape[1])).to_event(1))
            u = pyro.deterministic("u", z + mechanism_shift(dose * hit, effect), event_dim=1)
            mean = batch.library_size * (u @ self.loadings + self.bias).softmax(-1)
            return pyro.sample("x", pc.distributions.Poisson(mean, batch.nonzeros), obs=batch.x)


def test_supports_are_kept_and_the_fit_improves(data):
    torch.manual_seed(0)
    model = Linear(*data.sizes)
    guide = pc.auto_guide(model, data)
    assert pc.check_model(model, guide, data)
    fit = pc.fit(model, guide, data, max_epochs=15, batch_size=64, seed=0)
    assert fit.history["elbo"].iloc[-1] > fit.history["elbo"].iloc[0]
    draws = pc.posterior.global_draws(fit, 50)
    assert draws["penetrance"].min() > 0
    assert draws["penetrance"].max() < 1
    assert pc.effects(fit, pc.perturb("pert0"), draws=4).sizes == {"intervention": 1, "draw": 4, "gene": 30}


def test_a_model_of_the_collection_gets_a_guide(data):
    model, _ = pc.build("sams_vae", data, n_latent=4)
    guide = pc.auto_guide(model, data)
    fit = pc.fit(model, guide, data, max_epochs=3, seed=0)
    assert set(pc.posterior.global_draws(fit, 2)) == {"mask", "effect"}


def test_other_discrete_sites_and_models_without_latents_are_refused(data):
    class Mixture(PyroModule):
        def forward(self, batch):
            with batch.cells():
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                pyro.sample("x", dist.Normal(k.float()[:, None].expand(-1, batch.dose.shape[0]), 1.0).to_event(1))

    class Empty(PyroModule):
        def forward(self, batch):
            with batch.cells():
                pyro.sample("x", dist.Normal(torch.zeros(30), 1.0).to_event(1), obs=batch.x)

    with pytest.raises(pc.errors.ContractError, match="'k' is discrete"):
        pc.auto_guide(Mixture(), data)
    with pytest.raises(pc.errors.ContractError, match="no latent site"):
        pc.auto_guide(Empty(), data)
