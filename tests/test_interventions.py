"""The vocabulary: the algebra of interventions, what they compile to, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pyrocausal as pc
from pyrocausal.errors import InterventionError
from pyrocausal.interventions import Intervention, as_list, compile_sites, parse

torch.set_num_threads(1)
NAMES = ["A", "B", "C", "D"]
N_PROGRAMS = 3
laws = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="session")
def counts() -> pc.PerturbationData:
    adata = pc.simulate.svae_screen(n_perturbations=5, n_latent=3, cells_per_perturbation=20, n_genes=20, n_control=30, seed=1)
    return pc.PerturbationData.from_anndata(adata, modality="knockout")


@pytest.fixture(scope="session")
def pair(counts: pc.PerturbationData) -> tuple[Any, Any]:
    return pc.build("sams_vae", counts, n_latent=N_PROGRAMS, n_hidden=16)


@pytest.fixture(scope="session")
def fit_without_pert3(counts: pc.PerturbationData) -> pc.Fit:
    train, _ = counts.split("perturbations", test=["pert3"])
    return pc.fit(*pc.build("sams_vae", train, n_latent=N_PROGRAMS, n_hidden=16, turns=()), train, max_epochs=1)


# -- the algebra ---------------------------------------------------------------------------------------------------------------

doses = st.builds(pc.perturb, st.sampled_from(NAMES), dose=st.sampled_from([0.0, 0.5, 1.0, 2.0]), penetrance=st.sampled_from([0.3, 1.0]))
flips = st.builds(pc.flip_target, st.sampled_from(NAMES), st.integers(0, N_PROGRAMS - 1))
atoms = st.one_of(doses, flips, st.builds(pc.silence, st.sampled_from(NAMES)), st.just(pc.untreated()))


def _join(parts: list[Intervention]) -> Intervention:
    out = parts[0]
    for part in parts[1:]:
        out = out & part
    return out


def _compatible(parts: list[Intervention]) -> bool:
    """Whether every perturbation has one dose and one penetrance."""
    given_to: dict[str, set[tuple[float, float]]] = {}
    for part in parts:
        for name, dose in part.doses or ():
            given_to.setdefault(name, set()).add((dose, dict(part.penetrances).get(name, 1.0)))
    return all(len(v) == 1 for v in given_to.values())


interventions = st.lists(atoms, min_size=1, max_size=4).filter(_compatible).map(_join)


def outcome(make: Callable[[], Any]) -> Any:
    """The value, or the kind of the refusal."""
    try:
        return make()
    except InterventionError:
        return "refused"


@laws
@given(interventions, interventions)
def test_and_is_commutative(a, b):
    assert outcome(lambda: a & b) == outcome(lambda: b & a)


@laws
@given(interventions)
def test_and_is_idempotent(a):
    assert a & a == a
    assert hash(a & a) == hash(a)


@laws
@given(interventions, interventions, interventions)
def test_and_is_associative(a, b, c):
    assert outcome(lambda: (a & b) & c) == outcome(lambda: a & (b & c))


@laws
@given(
    st.lists(st.builds(pc.perturb, st.sampled_from("AB"), st.sampled_from([0.0, 1.0]), st.sampled_from([0.3, 1.0])), min_size=2, max_size=4)
)
def test_parts_that_disagree_are_refused_and_others_never(parts):
    assert (outcome(lambda: _join(parts)) == "refused") is not _compatible(parts)


@laws
@given(interventions, interventions)
def test_different_interventions_have_different_names(a, b):
    assert (str(a) == str(b)) == (a == b)


def test_close_doses_have_different_names():
    curve = [pc.perturb("A", dose=0.5), pc.perturb("A", dose=0.50000001)]
    assert len({str(i) for i in curve}) == 2


def test_untreated_is_neutral_for_doses():
    assert pc.perturb("A") & pc.untreated() == pc.perturb("A")
    assert pc.silence("A") & pc.untreated() != pc.silence("A")  # untreated() takes the treatment away, silence() alone leaves it


def test_words_do_not_count_for_equality():
    assert pc.knockout("A") == pc.perturb("A") == pc.activate("A") == pc.knockdown("A")


@laws
@given(st.sets(st.sampled_from(NAMES), min_size=1), st.randoms(use_true_random=False))
def test_labels_are_conjunctions(names, random):
    parts = sorted(names)
    random.shuffle(parts)
    expected = _join([pc.perturb(n) for n in parts])
    assert parse("+".join(parts)) == expected
    assert parse("_".join([*parts, "ctrl"]), separator="_", control="ctrl") == expected
    assert parse("control") == pc.untreated()


def test_do_argument_in_all_its_forms():
    kd, pair = pc.perturb("A"), pc.perturb("A") & pc.perturb("B")
    assert as_list(kd) == as_list("A") == [("A", kd)]
    assert as_list(["A", "A+B", "control"]) == [("A", kd), ("A & B", pair), ("untreated", pc.untreated())]
    assert as_list({"mine": pair, "same": pair}) == [("mine", pair), ("same", pair)]


# -- compiling -----------------------------------------------------------------------------------------------------------------


def by_hand(acts: list[Intervention], base: Tensor, mask: Tensor, effect: Tensor, uniform: Tensor) -> dict[str, Tensor]:
    """The definition, entry by entry: dose [K, n, P], whether it takes [K, n, P], mask and effect [K, P, D]."""
    shape = (len(acts), *base.shape)
    out = {"dose": torch.empty(shape), "hit": torch.empty(shape)}
    out |= {"mask": mask.repeat(len(acts), 1, 1), "effect": effect.repeat(len(acts), 1, 1)}
    for k, n, p in itertools.product(*map(range, shape)):
        given_doses, shares = acts[k].doses, dict(acts[k].penetrances)
        out["dose"][k, n, p] = base[n, p] if given_doses is None else dict(given_doses).get(NAMES[p], 0.0)
        out["hit"][k, n, p] = float(uniform[n, p] < shares.get(NAMES[p], 1.0))
    for k, p, d in itertools.product(range(len(acts)), range(len(NAMES)), range(mask.shape[1])):
        if (NAMES[p], d) in acts[k].flips:
            out["mask"][k, p, d] = 1 - mask[p, d]
        if NAMES[p] in acts[k].silenced:
            out["effect"][k, p, d] = 0.0
    return out


def _world(seed: int, n: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (len(NAMES), N_PROGRAMS)
    base = torch.bernoulli(torch.full((n, len(NAMES)), 0.4), generator=g)
    mask = torch.bernoulli(torch.full(shape, 0.5), generator=g)
    return base, mask, torch.randn(shape, generator=g), torch.rand(n, len(NAMES), generator=g)


@laws
@given(st.lists(interventions, min_size=1, max_size=4), st.integers(0, 1000), st.booleans(), st.booleans())
def test_compiled_sites_are_the_definition(acts, seed, with_hit, with_draws):
    base, mask, effect, uniform = _world(seed)
    tables = {"mask": mask, "effect": effect}
    if with_draws:  # [S, 1, 1, P, D], as under the plates of draws and interventions
        tables = {k: v.expand(2, 1, 1, *v.shape) for k, v in tables.items()}
    sites = {"dose", "mask", "effect"} | ({"hit"} if with_hit else set())
    got = compile_sites(acts, NAMES, base, tables, sites, uniform)
    want = by_hand(acts, base, mask, effect, uniform)
    if any(a.penetrances for a in acts) and with_hit:
        assert torch.equal(got["hit"].expand_as(want["hit"]), want["hit"])
        assert torch.equal(got["dose"].expand_as(want["dose"]), want["dose"])
    else:
        assert "hit" not in got
        assert torch.equal(got["dose"].expand_as(want["dose"]), want["dose"] * want["hit"])
    for site, acted in (("mask", any(a.flips for a in acts)), ("effect", any(a.silenced for a in acts))):
        assert (site in got) == acted
        if acted:
            assert got[site].shape[-4:-2] == (len(acts), 1)
            for s in range(2 if with_draws else 1):
                assert torch.equal(got[site][s, :, 0] if with_draws else got[site][:, 0], want[site])


@laws
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.25, 1.0, 3.0]), min_size=1))
def test_conjunction_of_doses_is_the_multi_hot_dose(amounts):
    both = _join([pc.perturb(name, dose=amount) for name, amount in amounts.items()])
    dose = compile_sites([both], NAMES, torch.ones(2, len(NAMES)), {}, {"dose"})["dose"]
    assert torch.equal(dose[0], torch.tensor([[amounts.get(n, 0.0) for n in NAMES]]).expand(2, -1))


def test_compiling_leaves_its_arguments_alone():
    base, mask, effect, uniform = _world(0)
    before = [v.clone() for v in (base, mask, effect, uniform)]
    act = pc.perturb("A", penetrance=0.5) & pc.flip_target("A", 0) & pc.silence("B")
    compile_sites([act], NAMES, base, {"mask": mask, "effect": effect}, {"dose", "mask", "effect"}, uniform)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, mask, effect, uniform), strict=True))


# -- do ------------------------------------------------------------------------------------------------------------------------


def run(model: Any, batch: Any, seed: int = 5) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trace = poutine.trace(model).get_trace(batch)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and n != "cell"}


def _tables(data: pc.PerturbationData) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    shape = (len(data.perturbations), N_PROGRAMS)
    return {"mask": torch.bernoulli(torch.full(shape, 0.5), generator=g), "effect": torch.randn(shape, generator=g)}


ACTS = {
    "single": pc.knockout("pert0"),
    "half dose of two": pc.perturb("pert0", dose=0.5) & pc.perturb("pert4"),
    "untreated": pc.untreated(),
    "flip": pc.flip_target("pert1", 2),
    "silence": pc.silence("pert1"),
    "all": pc.perturb("pert1") & pc.flip_target("pert1", 0) & pc.silence("pert2"),
}


@pytest.mark.parametrize("name", ACTS)
def test_do_is_pyro_do(pair, counts, name):
    model, batch, tables = pair[0], counts.batch(range(6)).hide(), _tables(counts)
    values = pc.sites(model, ACTS[name], counts, tables)
    ours, theirs = run(pc.do(model, ACTS[name], counts, tables), batch), run(pyro.do(model, data=values), batch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_do_reaches_the_observation_by_the_definition(pair, counts):
    model, batch, tables = pair[0], counts.batch(range(6)).hide(), _tables(counts)
    got, plain = run(pc.do(model, ACTS["all"], counts, tables), batch), run(model, batch)
    mask, effect = tables["mask"].clone(), tables["effect"].clone()
    mask[1, 0] = 1 - mask[1, 0]
    effect[2] = 0
    assert torch.allclose(got["shift"], (mask * effect)[1].expand(6, -1))
    assert torch.equal(got["effect"], plain["effect"])  # a trace reports the natural value under the site's own name
    assert torch.equal(got["z"], plain["z"])


def test_do_leaves_the_callers_random_state(pair, counts):
    before = torch.get_rng_state()
    pc.do(pair[0], pc.knockout("pert0"), counts)
    assert torch.equal(before, torch.get_rng_state())


def test_do_twice_on_different_sites_is_both(pair, counts):
    model, batch, tables = pair[0], counts.batch(range(6)).hide(), _tables(counts)
    twice = pc.do(pc.do(model, pc.knockout("pert1"), counts), pc.silence("pert1"), counts, tables)
    values = pc.sites(model, pc.knockout("pert1") & pc.silence("pert1"), counts, tables)
    ours, theirs = run(twice, batch), run(pyro.do(model, data=values), batch)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_labels_are_accepted_by_do(pair, counts):
    got = pc.sites(pair[0], "pert0+pert2", counts)
    assert list(got) == ["dose"]
    assert torch.equal(got["dose"], torch.tensor([[1.0, 0, 1, 0, 0]]))


# -- refusals ------------------------------------------------------------------------------------------------------------------


def refused(make: Callable[[], Any], *words: str) -> None:
    """The call is refused in one line that holds all the words."""
    with pytest.raises(InterventionError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    for word in words:
        assert word in message


@pytest.mark.parametrize("dose", [-1, -1e-9, float("nan"), float("inf"), "1", None])
def test_a_dose_is_a_number_of_at_least_zero(dose):
    refused(lambda: pc.perturb("A", dose=dose), "dose=", "'A'")


@pytest.mark.parametrize("dose", [np.float32(0.5), np.float64(0.5), np.int64(2), 2])
def test_numbers_of_numpy_are_doses(dose):
    assert pc.perturb("A", dose=dose) == pc.perturb("A", dose=float(dose))


@pytest.mark.parametrize("penetrance", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_penetrance_is_a_share(penetrance):
    refused(lambda: pc.perturb("A", penetrance=penetrance), "penetrance=", "'A'", "from 0 to 1")


def test_conflicts_are_refused():
    refused(lambda: pc.perturb("A", dose=1) & pc.perturb("A", dose=2), "'A'", "dose", "give one")
    refused(lambda: pc.perturb("A", penetrance=0.2) & pc.perturb("A", penetrance=0.4), "'A'", "penetrance", "give one")


def test_full_penetrance_conflicts_with_partial():
    refused(lambda: pc.perturb("A") & pc.perturb("A", penetrance=0.4), "'A'", "penetrance", "give one")


def test_unknown_names_are_refused_with_the_closest(pair, counts):
    refused(lambda: pc.do(pair[0], pc.knockout("pert_3"), counts), "'pert_3'", "did you mean", "'pert3'")
    refused(lambda: pc.do(pair[0], pc.silence("xyz"), counts, _tables(counts)), "'xyz'", "there are 5")
    refused(lambda: pc.do(pair[0], pc.flip_target("PERT1", 0), counts, _tables(counts)), "'PERT1'", "did you mean 'pert1'?")


@pytest.mark.parametrize("word", [pc.activate, pc.knockdown])
def test_a_word_of_another_modality_is_refused(pair, counts, word):
    refused(lambda: pc.do(pair[0], word("pert0"), counts), word.__name__, "knockout screen")
    refused(lambda: pc.do(pair[0], pc.knockout("pert0") & word("pert1"), counts), word.__name__)


def test_on_a_neutral_screen_every_word_is_heard(pair, counts):
    from dataclasses import replace

    neutral = replace(counts, modality="perturbation")
    for word in (pc.knockout, pc.knockdown, pc.activate):
        assert torch.equal(pc.sites(pair[0], word("pert0"), neutral)["dose"], torch.eye(5)[:1])


def test_a_perturbation_without_training_cells_is_refused(fit_without_pert3):
    for act in (pc.knockout("pert3"), pc.knockout("pert0") & pc.knockout("pert3"), pc.silence("pert3")):
        refused(lambda act=act: pc.effects(fit_without_pert3, act, draws=2, cells=4), "no training cell", "'pert3'")


def test_second_do_on_one_site_is_refused(pair, counts):
    once = pc.do(pair[0], pc.knockout("pert0"), counts)
    refused(lambda: pc.do(once, pc.knockout("pert1"), counts), "'dose'", "already")


def test_do_after_pyros_own_do_on_one_site_is_refused(pair, counts):
    once = pyro.do(pair[0], data={"dose": torch.zeros(1, 5)})
    refused(lambda: pc.do(once, pc.knockout("pert1"), counts), "'dose'", "already")


def test_tables_must_be_given_to_flip_and_silence(pair, counts):
    refused(lambda: pc.do(pair[0], pc.flip_target("pert0", 0), counts), "flip_target", "given=", "mask")
    refused(lambda: pc.do(pair[0], pc.silence("pert0"), counts), "silence", "given=", "effect")


@pytest.mark.parametrize("program", [-1, N_PROGRAMS])
def test_a_program_that_is_not_there_is_refused(pair, counts, program):
    refused(lambda: pc.do(pair[0], pc.flip_target("pert0", program), counts, _tables(counts)), f"program {program}", f"{N_PROGRAMS}")


def test_penetrance_is_refused_where_cells_are_not_known(pair, counts):
    refused(lambda: pc.do(pair[0], pc.perturb("pert0", penetrance=0.5), counts), "penetrance", "effects")


def test_what_the_model_lacks_is_refused(counts):
    dense, _ = pc.build("cpa_vae", counts, n_latent=N_PROGRAMS, n_hidden=16)

    def bare(batch, dosed=True):
        with batch.cells():
            if dosed:
                pyro.deterministic("dose", batch.dose, event_dim=1)
            return pyro.sample("x", pyro.distributions.Poisson(batch.library_size.expand(-1, 20)).to_event(1), obs=batch.x)

    refused(lambda: pc.do(lambda batch: bare(batch, dosed=False), pc.knockout("pert0"), counts), "no site 'dose'")
    refused(lambda: pc.do(bare, pc.flip_target("pert0", 0), counts, _tables(counts)), "no sampled site 'mask'")
    once = pc.do(bare, pc.knockout("pert0"), counts)
    refused(lambda: pc.do(once, pc.silence("pert0"), counts, _tables(counts)), "no sampled site 'effect'")
    refused(lambda: pc.do(dense, pc.flip_target("pert0", 0), counts), "mask")


@pytest.mark.parametrize("do", [[], {}, [3], {"a": "pert0"}, [None]])
def test_nothing_and_nonsense_are_refused(do):
    refused(lambda: as_list(do), "do=")


def test_repeated_questions_are_refused():
    refused(lambda: as_list(["A+B", pc.perturb("B") & pc.perturb("A")]), "'A & B'", "more than once")
