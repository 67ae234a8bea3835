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
# # Gene dynamics: a directed network, and what happens after a perturbation
#
# `linear_lcd` takes cells for the stationary state of a linear stochastic differential equation between genes. Control cells alone show who
# goes with whom; perturbations show who drives whom. The screen is simulated from the published benchmark's systems (20 genes, 12 of them
# perturbed), so that every answer can be checked.

# %%
import warnings

warnings.filterwarnings("ignore")  # of ArviZ about its next version, and of tqdm about widgets

import arviz as az
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import torch

import pyrocausal as pc
from pyrocausal.dynamics.response import response
from pyrocausal.dynamics.select import select_settings
from pyrocausal.graph_metrics import graph_scores
from pyrocausal.simulate_sde import linear_sde_screen

adata = linear_sde_screen(n_genes=20, n_perturbed=12, degree=4, doubles=4, seed=1)
truth = adata.uns["truth"]
data = pc.PerturbationData.from_anndata(adata)
train, test = data.split("combinations", test=[c for c in data.conditions if "+" in c])
print(train)

# %% [markdown]
# ## A fit, its prior chosen by held-out cells
#
# With fewer perturbations than genes, the sparse prior carries part of the answer. How strong it is, is chosen by the likelihood of cells
# that the candidates have not seen.

# %%
choice = select_settings(train, standardise=False, progress=False, max_epochs=800)
print(choice.round(3))
model, guide = pc.build("linear_lcd", train, standardise=False, draws=20, steps=200, **choice["settings"][0])
fit = pc.fit(model, guide, train, max_epochs=2000, kl_warmup=0.0, seed=0, progress=False)
print(fit)
print(pc.identifiability(fit))

# %% [markdown]
# ## The network, beside the precision matrix
#
# The score of a linear diffusion is minus the precision matrix: symmetric, whatever the truth. It is all that score matching, and
# control cells, can give.

# %%
idata = pc.to_inference_data(fit, draws=100)
graph = idata.posterior["graph"]
regulation = graph.mean(("chain", "draw")).to_numpy()
x = train.dense(np.float64)[train.is_control]
matrices = {"truth": truth["graph"], "linear_lcd": regulation, "precision": -np.linalg.inv(np.cov(x.T))}
figure, axes = plt.subplots(1, 3, figsize=(12, 4))
for ax, (name, M) in zip(axes, matrices.items(), strict=True):
    M = np.where(np.eye(20, dtype=bool), 0, M)
    ax.imshow(M, cmap="RdBu_r", vmin=-3, vmax=3)
    s = graph_scores(M, truth["graph"])
    ax.set_title(name if name == "truth" else f"{name}: F1 {s['f1']:.2f}, direction {s['direction']:.2f}")
    ax.set(xlabel="effect", ylabel="cause")
figure.tight_layout()

# %% [markdown]
# Intervals from a weighted likelihood bootstrap; the strongest edges, and the graph without the uncertain ones.

# %%
strongest = np.argsort(-np.abs(regulation).ravel())[:8]
edges = [(str(data.genes[k // 20]), str(data.genes[k % 20])) for k in strongest]
picked = {f"{a} -> {b}": graph.sel(gene=a, gene_to=b).to_numpy() for a, b in edges}
axes = az.plot_forest(az.from_dict(posterior=picked), combined=True, hdi_prob=0.9, figsize=(6, 3))
axes[0].scatter(
    [truth["graph"][k // 20, k % 20] for k in strongest[::-1]], axes[0].get_yticks()[: len(edges)], marker="x", color="k", zorder=5
)
axes[0].set_title("regulation: 90 % intervals; x, the truth")

network = pc.to_networkx(fit)
sure = nx.DiGraph((a, b, d) for a, b, d in network.edges(data=True) if not a.startswith("do(") and d["probability"] > 0.95)
at = {str(g): i for i, g in enumerate(data.genes)}
right = sum(truth["graph"][at[a], at[b]] != 0 for a, b in sure.edges)
print(f"{sure.number_of_edges()} edges with a probability above .95, {right} of them among the {(truth['graph'] != 0).sum()} true ones")

# %% [markdown]
# ## Questions
#
# Pairs that no cell had, half a dose, a gene held at a value, an edge cut. Each answer comes from the equations with that one thing changed.

# %%
pairs = [c for c in test.conditions if c != "control"]
answers = pc.effects(fit, pairs, draws=20)["effect"].mean("draw").to_numpy()
exact = np.array([truth["means"][list(truth["conditions"]).index(p)] - truth["means"][0] for p in pairs])
print(f"unseen pairs: correlation with the exact change {np.corrcoef(answers.ravel(), exact.ravel())[0, 1]:.3f}")

first = str(data.perturbations[0])
child = str(data.genes[np.abs(regulation[at[first]]).argmax()])
asked = {
    first: pc.perturb(first),
    f"half of {first}": pc.perturb(first, dose=0.5),
    f"{first} held at 1": pc.clamp(first, 1.0),
    f"{first}, {first} -> {child} cut": pc.perturb(first) & pc.cut(first, child),
}
print(pc.effects(fit, asked, draws=20)["effect"].mean("draw").sel(gene=[first, child]).to_pandas().round(2))

# %% [markdown]
# And one cell: the same noise, another treatment.

# %%
cells = train.select("control")[:3]
twins = pc.counterfactual(fit, cells, first, draws=20)
print(twins["effect"].mean("draw").sel(intervention=first).sel(gene=[first, child, "gene02"]).to_pandas().round(2))

# %% [markdown]
# ## After the perturbation
#
# The model is a dynamical system, so that it has a time course: the target first, then what it regulates. Time is in units of the noise
# (stationary cells know no hours).

# %%
times = np.linspace(0, 4, 41)
course = response(fit, first, times, draws=20)["effect"].sel(intervention=first)
last = np.abs(course.isel(time=-1).mean("draw"))
for gene in [first, *[str(g) for g in last["gene"].to_numpy()[np.argsort(-last.to_numpy())][:5] if g != first]]:
    line = course.sel(gene=gene)
    low, high = (line.quantile(q, "draw") for q in (0.05, 0.95))
    plt.plot(times, line.mean("draw"), label=gene, lw=3 if gene == first else 1.5)
    plt.fill_between(times, low, high, alpha=0.2)
plt.gca().set(xlabel="time", ylabel="change of the mean", title=f"after {first}")
plt.legend()
plt.show()
# %% [markdown]
# ## The published diffusion and its linearisation
#
# `lcd` has a neural network for a drift, trained as a score. CLIPR linearises its answers to perturbations; with a score the matrix tends
# to be symmetric, and `curl="target"` turns it such that every perturbation acts on its own gene.

# %%
model, guide = pc.build("lcd", train, n_hidden=128)
score_fit = pc.fit(model, guide, train, max_epochs=80, batch_size=256, lr=3e-3, seed=0, progress=False)
with torch.no_grad():
    found = {
        "CLIPR, as published": pc.clipr(score_fit),
        "slope of the score": pc.clipr(score_fit, jacobian=True),
        "CLIPR, turned": pc.clipr(score_fit, curl="target"),
        "linear_lcd, its drift": pc.clipr(fit, jacobian=True, draws=20),
    }
for name, result in found.items():
    scale = 1.0 if "linear_lcd" in name else 0.5  # the score is of a diffusion with noise sqrt(2), the screen's is 1
    s = graph_scores(scale * result.effects.mean("draw").to_numpy(), truth["drift"])
    print(f"{name:22} asymmetry {result.asymmetry:.2f}, AUROC {s['auroc']:.2f}, F1 {s['f1']:.2f}, direction {s['direction']:.2f}")
print(found["CLIPR, as published"])
