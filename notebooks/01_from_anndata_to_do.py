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
# # From AnnData to a do-query in ten minutes
#
# A perturbation screen goes in; a causal generative model comes out; we ask it what a knock-out does, what *this* cell would have looked
# like, and how sure it is. The screen is simulated, so that every answer can be checked against the truth. To use your own, replace the
# first cell by `adata = anndata.read_h5ad("screen.h5ad")`.

# %%
import warnings

warnings.filterwarnings("ignore")  # of ArviZ about its next version, and of tqdm about widgets

import arviz as az
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pyro

import pyrocausal as pc
from pyrocausal import evaluate, plots

adata = pc.demo_screen()
adata

# %% [markdown]
# ## The screen as data
#
# `from_anndata` checks the screen and refuses what cannot be modelled (NaN, missing controls, duplicate genes, ...). A fifth of the cells of
# every condition is held out; nothing below is fitted on them.

# %%
data = pc.PerturbationData.from_anndata(adata, perturbation_key="perturbation", control="control", batch_key="batch", modality="knockout")
train, test = data.split("cells", test=0.2, seed=0)
print(data)

# %% [markdown]
# ## A model, its guide, and a fit
#
# SAMS-VAE: a knock-out moves a few latent programs (`mask`), each by some amount (`effect`); combinations add; a decoder turns programs into
# counts. `check_model` says in plain words whether a pair keeps the contract, `fit` trains it.

# %%
model, guide = pc.build("sams_vae", data, n_latent=10)
print(pc.check_model(model, guide, data))
fit = pc.fit(model, guide, train, validation=test, max_epochs=120, batch_size=128, seed=0)
print(fit)
fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
plots.elbo_curve(fit, ax=ax)
plt.show()

# %% [markdown]
# ## Which programs does a knock-out target?
#
# The posterior probability of each target. Knock-outs of one pathway should share a program, and half of the knock-outs of this screen do
# nothing at all.

# %%
idata = pc.to_inference_data(fit, draws=400, cells=test[:200])
probability = idata.posterior["mask"].mean(("chain", "draw"))
fig, ax = plt.subplots(figsize=(5.4, 6.4), layout="constrained")
plots.target_mask(probability.to_numpy(), list(data.perturbations), ax=ax)
plt.show()

# %%
truth = {name: adata.uns["truth"]["programs"][row > 0] for name, row in zip(data.perturbations, adata.uns["truth"]["mask"], strict=True)}
for name, row in zip(data.perturbations, probability.to_numpy(), strict=True):
    print(f"{name:8s} found: {np.flatnonzero(row > 0.5).tolist()!s:8s} truth: {', '.join(truth[name]) or '-'}")

# %% [markdown]
# ## Rung 2: what does a knock-out do to a population?
#
# `effects` draws from the posterior, runs treated and untreated worlds on the same fresh cells, and returns labelled draws. The measured
# effect comes from the held-out cells.

# %%
single, double = pc.knockout("STAT1"), pc.knockout("JAK2") & pc.knockout("KEAP1")
effects = pc.effects(fit, {"STAT1": single, "JAK2+KEAP1": double}, draws=200)
measured = evaluate.measured_effects(test)
effects

# %%
genes = ["STAT1", "PSMB9", "UBE2L6", "CXCL10", "NQO1", "HMOX1", "GAPDH"]
genes = [g for g in genes if g in data.genes]
effects["effect"].sel(gene=genes).quantile([0.05, 0.5, 0.95], dim="draw").to_series().unstack("quantile").round(2)

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
plots.effects_forest(effects, measured, "STAT1", genes, ax=axes[0])
plots.effects_forest(effects, measured, "JAK2+KEAP1", genes, ax=axes[1])
plt.show()

# %% [markdown]
# Half of the dose, or a knock-out that takes in half of the cells, are different questions with different answers:

# %%
questions = [pc.knockout("STAT1", dose=0.5), pc.knockout("STAT1", penetrance=0.5), pc.silence("STAT1") & pc.knockout("STAT1")]
pc.effects(fit, questions, draws=100)["effect"].sel(gene=genes).mean("draw").to_pandas().round(2)

# %% [markdown]
# ## Rung 3: what would these very cells have looked like?
#
# Twenty control cells, as if STAT1 had been knocked out in them: their basal state is abducted, the noise of their counts is carried over
# (Poisson thinning), and genes whose rate does not change keep their counts. The factual action gives back the factual cell.

# %%
cells = test.select("control")[:20]
twins = pc.counterfactual(fit, cells, [single, pc.untreated()], draws=20, units="counts")
print("counts changed by doing nothing:", float(abs(twins["effect"].sel(intervention="untreated")).max()))
twins["effect"].sel(intervention="STAT1", gene=genes).mean("draw").to_pandas().round(1).head()

# %% [markdown]
# ## It is just Pyro
#
# `pc.do` is `pyro.do` with names in place of tensors.

# %%
print(pc.sites(model, single, data))
intervened = pc.do(model, single, data)
trace = pyro.poutine.trace(intervened).get_trace(cells.batch())
trace.nodes["x_loc"]["value"].shape

# %% [markdown]
# ## ArviZ and NetworkX
#
# Draws are independent, so R-hat and ESS have nothing to say; intervals, forests and leave-one-out do.

# %%
az.plot_forest(idata, var_names=["net_effect"], coords={"perturbation": ["STAT1", "KEAP1"]}, combined=True, figsize=(7, 5))
plt.show()

# %%
az.loo(idata)

# %%
graph = pc.to_networkx(fit, n_genes=6)
targeted = [n for n, kind in graph.nodes("kind") if kind == "perturbation" and graph.out_degree(n) == 0]
graph.remove_nodes_from(targeted)
colours = {"perturbation": "#0072B2", "program": "#E69F00", "gene": "#999999"}
layer = {"perturbation": 0, "program": 1, "gene": 2}
nx.set_node_attributes(graph, {n: layer[kind] for n, kind in graph.nodes("kind")}, "layer")
position = nx.multipartite_layout(graph, subset_key="layer")
fig, ax = plt.subplots(figsize=(9, 7), layout="constrained")
nx.draw_networkx(
    graph, position, ax=ax, node_size=250, font_size=8, node_color=[colours[k] for _, k in graph.nodes("kind")], edge_color="#cccccc"
)
ax.axis("off")
plt.show()

# %% [markdown]
# ## Keep it
#
# A saved run is JSON and arrays, no pickle; `pc.load` builds the pair again.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    fit.save(Path(folder) / "run")
    again = pc.load(Path(folder) / "run")
print(again)
