"""Held-out interventions (the transfer task of sVAE+, on disjoint cells): check 8 of the dossier, small."""

import numpy as np
import pytest
import torch

import pyrocausal as pc
from pyrocausal.evaluate import mask_scores, mcc

HELD = ["pert00", "pert07", "pert13"]


@pytest.fixture(scope="module")
def world():
    adata = pc.simulate.svae_screen(n_perturbations=24, n_latent=5, cells_per_perturbation=120, n_genes=60, n_control=200, seed=3)
    data = pc.PerturbationData.from_anndata(adata)
    train, rest = data.split("perturbations", test=HELD, seed=0)
    adapt_on, evaluate_on = rest.split("cells", test=0.5, seed=1)
    model, guide = pc.build("sams_vae", train, n_latent=6)
    fit = pc.fit(model, guide, train, max_epochs=80, batch_size=128, seed=0)
    return adata, data, fit, pc.adapt(fit, adapt_on), adapt_on, evaluate_on


def test_targets_of_held_out_interventions_are_found(world):
    adata, data, _, adapted, _, evaluate_on = world
    u = adata[evaluate_on.cells].obsm["u"]
    with torch.no_grad():
        encoded = adapted.guide.encode(evaluate_on.batch())[0].numpy()
    _, columns = mcc(u, encoded)
    rows = [list(data.perturbations).index(p) for p in HELD]
    probability = adapted.guide.table.logits.sigmoid().numpy()[rows]
    scores = mask_scores(adata.uns["truth"]["mask"][rows], probability, matching=columns)
    assert scores.f1 >= 0.8


def test_evidence_of_unseen_cells_rises_and_the_mask_beats_all_ones(world):
    """The evidence is compared with knowing nothing of the new perturbations; targets with the reference's all-ones mask.

    The all-ones mask keeps every small effect, so its evidence, which pays no price for targets, is not below the sparse one's.
    """
    adata, data, fit, adapted, _, evaluate_on = world
    before = pc.iwelbo(fit, evaluate_on, particles=50).mean()
    after = pc.iwelbo(adapted, evaluate_on, particles=50).mean()
    assert after > before + 5.0
    rows = [list(data.perturbations).index(p) for p in HELD]
    truth = adata.uns["truth"]["mask"][rows]
    with torch.no_grad():
        _, columns = mcc(adata[evaluate_on.cells].obsm["u"], adapted.guide.encode(evaluate_on.batch())[0].numpy())
    found = adapted.guide.table.logits.sigmoid().numpy()[rows]
    assert mask_scores(truth, found, matching=columns).f1 > mask_scores(truth, np.ones_like(found), matching=columns).f1


def test_known_perturbations_and_networks_stay_as_they_were(world):
    *_, fit, adapted, _, _ = world
    known = fit.cells_per_perturbation > 0
    for name in ("logits", "loc", "scale"):
        assert torch.equal(getattr(fit.guide.table, name)[known], getattr(adapted.guide.table, name)[: len(known)][known])
    for name, value in fit.model.state_dict().items():
        assert torch.equal(value, adapted.model.state_dict()[name])
    assert np.all(adapted.cells_per_perturbation[[list(adapted.coords["perturbation"]).index(p) for p in HELD]] > 0)


def test_queries_on_adapted_perturbations_work_and_were_refused_before(world):
    *_, fit, adapted, _, _ = world
    with pytest.raises(pc.errors.InterventionError, match="no training cell received 'pert00'"):
        pc.effects(fit, pc.perturb("pert00"), draws=2)
    assert float(np.abs(pc.effects(adapted, pc.perturb("pert00"), draws=20).effect).max()) > 0.1


def test_nothing_new_is_refused(world):
    *_, data, fit, _, _, _ = world
    with pytest.raises(pc.errors.DataError, match="nothing to adapt"):
        pc.adapt(fit, data.select("pert01"))
