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
# # Programs over time: perturbations with a when
#
# `cite_vae` follows latent programs through the times of a screen. A perturbation cuts the parents of its targets and moves them; what
# follows, follows later. Every cell is seen once, at one time. The screen is simulated from the model's own process, so that every answer
# can be checked; the docstring of the model says what is our reconstruction of the paper.

# %%
import warnings

warnings.filterwarnings("ignore")  # of ArviZ about its next version, and of tqdm about widgets

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

import pyrocausal as pc
from pyrocausal import plots
from pyrocausal.simulate_course import course_screen

adata = course_screen(n_latent=3, n_invariant=2, n_perturbations=12, times=4, cells_per_condition=250, n_genes=12, doubles=4, seed=0)
truth = adata.uns["truth"]
data = pc.PerturbationData.from_anndata(adata, time_key="time")
pairs = [c for c in data.conditions if "+" in c]
train, test = data.split("combinations", test=pairs)
print(train)

# %% [markdown]
# ## A fit, the best of several starts
#
# The likelihood has local optima. `restarts=` fits from several starts and lets held-out cells choose. Cells count by the mean and covariance of
# each treatment and time alone, so that the objective has no noise, and quasi-Newton steps finish what gradient steps began.

# %%
model, guide = pc.build("cite_vae", train, n_latent=3, n_invariant=2, targets=truth["targets"])
fit = pc.fit(model, guide, train, max_epochs=100, lr=1e-1, kl_warmup=0.0, restarts=3, progress=False)
print(pd.DataFrame(fit.settings["restarts"]).round(3).to_string(index=False))

# %% [markdown]
# ## Programs of single cells, against the truth

# %%
some = train[::7]
as_was = pc.pulse(pc.clamp(0, 0.0), 0.0, 0.0)  # an empty pulse: the cell as it was
paths = pc.trajectory(fit, {"as it was": as_was}, some, draws=10)["program"][0].mean("draw").to_numpy()
found = paths[np.arange(len(some)), some.time.astype(int)]
true = adata[some.cells].obsm["u"]
correlation = np.abs(np.corrcoef(true.T, found.T)[:3, 3:])
print("mean correlation, each program with its match:", correlation[linear_sum_assignment(-correlation)].mean().round(3))

# %% [markdown]
# ## Sustained, pulsed, washed out

# %%
name = str(data.perturbations[0])
asked = {
    name: pc.perturb(name),
    "until time 1, then washed out": pc.untreated() & pc.pulse(pc.perturb(name), 0.0, 1.0),
    "from time 2 on": pc.untreated() & pc.sustain(pc.perturb(name), 2.0),
}
course = pc.trajectory(fit, asked, draws=10, n_cells=1000)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), sharey=True)
for ax, key in zip(axes, asked, strict=True):
    plots.time_courses(course, key, [0, 1, 2], ax=ax)

# %% [markdown]
# The same perturbation, gene by gene, against the cells of each time.

# %%
plots.time_courses(course, name, ["gene00", "gene03", "gene07"], train).figure

# %% [markdown]
# ## Pairs that no cell had
#
# A target that is cut from its parents does not hear of what another perturbation does to them: pairs do not add.

# %%
last = data.time == data.time.max()
mean = {c: data.dense()[last & (data.labels == c)].mean(0) for c in data.conditions}
change = np.stack([mean[c] - mean["control"] for c in pairs])
additive = np.stack([np.sum([mean[p] - mean["control"] for p in c.split("+")], axis=0) for c in pairs])
predicted = pc.trajectory(fit, pairs, draws=4, n_cells=500)["effect"].isel(time=-1).mean("draw").to_numpy()
for label, e in (("cite_vae", predicted), ("sum of the measured singles", additive)):
    print(f"{label:28} relative error {np.linalg.norm(e - change) / np.linalg.norm(change):.2f}")

# %% [markdown]
# ## One cell, another history
#
# A cell was seen once, at the end. Each draw is a history that may have led there; another treatment of the same noise is another end.

# %%
cell = train[np.flatnonzero((train.labels == "control") & (train.time == 3))][:1]
history = pc.trajectory(fit, {"as it was": as_was, name: pc.perturb(name)}, cell, draws=60)["program"].isel(cell=0)
figure, axes = plt.subplots(1, 3, figsize=(12, 3), sharey=True)
for k, ax in enumerate(axes):
    for key, colour in (("as it was", "#0072B2"), (name, "#D55E00")):
        ax.plot(history["time"], history.sel(intervention=key, latent=k).T, color=colour, alpha=0.15, lw=0.8)
        ax.plot(history["time"], history.sel(intervention=key, latent=k).mean("draw"), color=colour, label=key)
    ax.set(title=f"program {k}", xlabel="time")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# ## Units that were seen at several times
#
# Where the same unit was seen again and again (or where you pair cells of different times yourself), name it by `unit_key=`. Then little is left
# open: the spread of a unit's histories, beside that of the cell above.

# %%
again = course_screen(n_latent=3, n_invariant=2, n_perturbations=12, times=4, cells_per_condition=40, n_genes=12, trajectories=True, seed=1)
units = pc.PerturbationData.from_anndata(again, time_key="time", unit_key="unit")
model, guide = pc.build("cite_vae", units, n_latent=3, n_invariant=2, targets=again.uns["truth"]["targets"])
seen = pc.fit(model, guide, units, max_epochs=100, lr=1e-1, kl_warmup=0.0, restarts=2, progress=False)
whole = pc.trajectory(seen, {name: pc.perturb(name)}, units[units.is_control][:1], draws=60)["program"].isel(cell=0)
for label, paths in (("seen once, at the end", history), ("seen at all times", whole)):
    spread = paths.sel(intervention=name).std("draw").mean("latent").round(3).to_numpy()
    print(f"{label:22} spread of the programs at times 0 to 3 under {name}:", spread)

# %% [markdown]
# ## What acts at once, and what acts later

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
for lag, ax in enumerate(axes):
    network = pc.to_networkx(fit, draws=2, lag=lag, minimum_edge=0.05)
    programs = network.subgraph(n for n, kind in network.nodes("kind") if kind == "program")
    place = nx.circular_layout(sorted(programs))
    nx.draw(
        programs,
        place,
        ax=ax,
        with_labels=True,
        node_color="#dbe7f3",
        node_size=1500,
        font_size=8,
        arrowsize=14,
        connectionstyle="arc3,rad=.15",
    )
    labels = {e: f"{w:.1f}" for e, w in nx.get_edge_attributes(programs, "mean").items() if e[0] != e[1]}
    nx.draw_networkx_edge_labels(programs, place, labels, ax=ax, font_size=8)
    ax.margins(0.25)
    ax.set_title("within a time" if lag == 0 else "from one time to the next")
