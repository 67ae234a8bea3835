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
# # A latent network: unseen perturbations, doses, and edges that mean something
#
# SCCVAE puts a network of programs between perturbations and genes. It can then answer for perturbations that no cell received, and for
# hard interventions on programs, *if* something pins the programs down. This notebook shows both, and how the library tells when nothing
# does. The screen is simulated, so that every answer can be checked.

# %%
import warnings

warnings.filterwarnings("ignore")  # of ArviZ about its next version, and of tqdm about widgets

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd

import pyrocausal as pc
from pyrocausal import embeddings, evaluate, plots, simulate_graph
from pyrocausal.modules import perturbation_modules

adata = simulate_graph.graph_screen(
    n_latent=6, n_genes=120, n_perturbations=36, cells_per_perturbation=150, n_control=900, n_embedding=4, edge_probability=0.3
)
truth = adata.uns["truth"]
embedding = simulate_graph.embedding_table(adata)
embedding.iloc[:3, :4].round(2)

# %% [markdown]
# Every perturbation shifts one of six programs, and which one follows from its embedding (on real screens:
# `embeddings.control_pca`, `from_pairs`, `from_gene_sets`, or a table of your own). Each program owns some genes, its *anchors*. Seven
# perturbations are held out altogether.

# %%
data = pc.PerturbationData.from_anndata(adata, kind="normalised")
held = [str(p) for p in data.perturbations[4::5]]
train, test = data.split("perturbations", test=held)
anchors = pd.DataFrame((adata.varm["loadings"] > 0).T, columns=adata.var_names)
model, guide = pc.build("sccvae", data, n_latent=6, embedding=embedding, decoder="anchored", anchors=anchors, n_hidden=64)
print(pc.check_model(model, guide, data))

# %%
fit = pc.fit(model, guide, train, max_epochs=40, batch_size=128, seed=0)
print(fit)
print(pc.collapse(fit, train))

# %% [markdown]
# ## The network
#
# Edges are sites with a prior, so they have posteriors. Solid: found; the number is the posterior mean, in brackets the truth.

# %%
graph = pc.to_networkx(fit)
network = graph.subgraph([n for n, kind in graph.nodes("kind") if kind == "program"])
fig, ax = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
place = nx.circular_layout(sorted(network))
nx.draw(
    network, place, ax=ax, with_labels=True, labels={n: n.split()[1] for n in network}, node_color="#cfe3f3", node_size=700, arrowsize=18
)
label = {(a, b): f"{e['mean']:.2f} ({truth['graph'][int(a.split()[1]), int(b.split()[1])]:.2f})" for a, b, e in network.edges(data=True)}
nx.draw_networkx_edge_labels(network, place, label, ax=ax, font_size=8)
_ = ax.set_title(f"{network.number_of_edges()} edges found, {int((truth['graph'] != 0).sum())} true", fontsize=10, loc="left")

# %% [markdown]
# ## Perturbations that no cell received
#
# Zero-shot: target from the embedding, penetrance from its prior. Few-shot: `adapt` learns both from half of the held-out cells, everything
# else frozen. Both are judged on the other half, beside the mean response of the training perturbations and that of the nearest embedding.

# %%
learn, judge = test.split("cells", test=0.5, seed=0)
control = train.select("control")
measured = evaluate.measured_effects(data[np.isin(data.cells, [*judge.cells, *control.cells])])
few = pc.adapt(fit, learn)
predictions = {
    "no effect": evaluate.baseline_effects(train, held, "control"),
    "mean response": evaluate.baseline_effects(train, held, "mean"),
    "nearest embedding": embeddings.nearest_embedding_effects(train, embedding, held),
    "SCCVAE, zero-shot": pc.effects(fit, held, draws=200),
    "SCCVAE, few-shot": pc.effects(few, held, draws=200),
}
scores = {who: evaluate.score_effects(p, measured)[["pearson", "mse", "relative_l2"]].mean() for who, p in predictions.items()}
pd.DataFrame(scores).T.round(3)

# %% [markdown]
# ## Doses
#
# The penetrance of a perturbation times a dose, over a grid, with 90 % bands. The diamonds are what was measured at dose 1.

# %%
strong = str(data.perturbations[np.argmax(np.where(fit.cells_per_perturbation > 0, truth["penetrance"], 0))])
response = pc.dose_response(fit, strong, np.linspace(0, 2, 9))
at_one = response["effect"].sel(perturbation=strong, dose=1.0).median("draw")
genes = [str(g) for g in abs(at_one).sortby(abs(at_one), ascending=False)["gene"].values[[0, 20, 40]]]
fig, ax = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
_ = plots.dose_curves(response, strong, genes, evaluate.measured_effects(train), ax=ax)

# %% [markdown]
# ## Hard interventions on programs
#
# `clamp` holds a program at a value and cuts the edges into it. Since the anchors pin the programs, the answer can be compared with the
# truth: program 0 at 2, everything downstream moves along the paths.

# %%
clamped = pc.effects(fit, pc.clamp(0, 2.0), draws=100)["effect"].isel(intervention=0)
total = np.linalg.inv(np.eye(6) - truth["graph"])
expected = 2.0 * total[0] @ adata.varm["loadings"].T
fig, ax = plt.subplots(figsize=(3.6, 3.4), layout="constrained")
ax.plot(expected, clamped.median("draw"), "o", ms=3)
ax.axline((0, 0), slope=1, color="0.6", lw=0.8)
_ = ax.set(xlabel="true effect of do(program 0 = 2)", ylabel="the model's")

# %% [markdown]
# ## When nothing pins the programs
#
# The same model with a free decoder fits as well and answers the same questions about shifts. But its decoder absorbs the network: the fold
# (a copy without edges, whose decoder took them in) gives the very same outputs, so neither its edges nor a clamp mean anything.

# %%
free, free_guide = pc.build("sccvae", data, n_latent=6, embedding=embedding, n_hidden=64)
free_fit = pc.fit(free, free_guide, train, max_epochs=40, batch_size=128, seed=0)
print(f"ELBO per cell: anchored {fit.history['elbo'].iloc[-1]:.1f}, free {free_fit.history['elbo'].iloc[-1]:.1f}\n")
print("anchored:", pc.identifiability(fit))
print("free:", pc.identifiability(free_fit))

# %% [markdown]
# ## Modules
#
# Perturbations whose responses point the same way, with the probability over posterior draws that two belong together.

# %%
seen = [str(p) for p in data.perturbations[fit.cells_per_perturbation > 0]]
found = perturbation_modules(pc.effects(fit, seen, draws=60))
print(found)
target = {str(p): int(k) for p, k in zip(data.perturbations, truth["mask"].argmax(1), strict=True)}
pd.DataFrame({name: pd.Series([target[m] for m in members]).value_counts() for name, members in found.members.items()}).fillna(0).astype(
    int
)
