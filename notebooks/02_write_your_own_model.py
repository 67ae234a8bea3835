# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own model
#
# A model is an ordinary Pyro program that takes a batch of cells. If it uses the reserved names (`dose`, `effect`, `z`, `x`, ...), then
# training, do-queries, counterfactuals, ArviZ, NetworkX and saving work without another line. Here: a linear factor model of counts, in
# which knock-outs move factors by amounts with a Laplace prior, so that most of them are small.
#
# $$
# e_{td} \sim \mathrm{Laplace}(0, 1), \quad z_n \sim N(0, I), \quad u_n = z_n + \mathrm{dose}_n\, e, \quad
# x_n \sim \mathrm{NB}(\ell_n\, \mathrm{softmax}(W u_n + b),\, \theta)
# $$

# %%
import warnings

warnings.filterwarnings("ignore")  # of tqdm about widgets

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyrocausal as pc
from pyrocausal import evaluate, plots
from pyrocausal.distributions import NegativeBinomial
from pyrocausal.structural import mechanism_shift


class LinearFactors(PyroModule):
    """Counts of cells whose factors are moved by knock-outs."""

    def __init__(self, n_genes, n_perturbations, n_latent=5):
        super().__init__()
        self.shape = (n_perturbations, n_latent)
        self.decoder = nn.Linear(n_latent, n_genes)
        self.theta = PyroParam(torch.full((n_genes,), 5.0), constraints.positive)

    def forward(self, batch):
        table = {"event_dims": ("perturbation", "latent")}
        effect = pyro.sample("effect", dist.Laplace(0.0, 1.0).expand(self.shape).to_event(2), infer=table)
        with batch.cells():
            dose = pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
            shift = pyro.deterministic("shift", mechanism_shift(dose, effect), event_dim=1)
            mean = batch.library_size * self.decoder(z + shift).softmax(-1)
            return pyro.sample("x", NegativeBinomial(mean, self.theta, batch.nonzeros), obs=batch.x)


# %% [markdown]
# The guide can be written by hand, as any Pyro guide, or made from the model: mean field for what all cells share, an encoder for what each
# cell has of its own. `check_model` says in plain words what is missing or wrong.

# %%
data = pc.PerturbationData.from_anndata(pc.demo_screen(), batch_key="batch", modality="knockout")
train, test = data.split("cells", test=0.2, seed=0)
torch.manual_seed(0)
model = LinearFactors(*data.sizes)
guide = pc.auto_guide(model, data)
print(pc.check_model(model, guide, data))

# %% [markdown]
# What does it say when something is wrong? Here the treatment is read from the batch and not from its site, so no intervention could reach it.


# %%
class Unreachable(LinearFactors):
    def forward(self, batch):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0).expand(self.shape).to_event(2))
        with batch.cells():
            pyro.deterministic("dose", batch.dose, event_dim=1)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand(self.shape[1:]).to_event(1))
            mean = batch.library_size * self.decoder(z + batch.dose @ effect).softmax(-1)
            return pyro.sample("x", NegativeBinomial(mean, self.theta, batch.nonzeros), obs=batch.x)


wrong = Unreachable(*data.sizes)
print(pc.check_model(wrong, pc.auto_guide(wrong, data), data))

# %% [markdown]
# ## Fit, ask, look: nothing else to write

# %%
fit = pc.fit(model, guide, train, validation=test, max_epochs=80, batch_size=64, lr=1e-2, kl_warmup=0.3, seed=0)
fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
plots.elbo_curve(fit, ax=ax)
plt.show()

# %%
effects = pc.effects(fit, {"STAT1": pc.knockout("STAT1"), "JAK2+KEAP1": pc.knockout("JAK2") & pc.knockout("KEAP1")}, draws=100)
measured = evaluate.measured_effects(test)
genes = ["PSMB9", "UBE2L6", "CXCL10", "NQO1", "HMOX1", "GAPDH"]
fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for ax, question in zip(axes, effects["intervention"].to_numpy(), strict=True):
    plots.effects_forest(effects, measured, str(question), genes, ax=ax)
plt.show()

# %% [markdown]
# Cells that were knocked out, as if they had not been: the interferon genes come back up.

# %%
twins = pc.counterfactual(fit, test.select("STAT1")[:10], pc.untreated(), draws=10, noise="mean")
twins["effect"].sel(gene=genes).mean(("draw", "cell")).to_pandas().round(2)

# %% [markdown]
# The posterior of the effects, with the names of the screen:

# %%
idata = pc.to_inference_data(fit, draws=200)
az.summary(idata, var_names=["effect"], kind="stats").loc["effect[STAT1, 0]":"effect[STAT1, 4]"]
