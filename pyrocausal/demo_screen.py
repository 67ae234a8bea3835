"""A small screen with a story that can be checked by eye: marker genes, a pathway, a pair, loners, and knock-outs that do nothing."""

from __future__ import annotations

import anndata as ad
import numpy as np
import scipy.sparse as sp

from pyrocausal.simulate import _screen

# Each program and the genes that rise with it.
PROGRAMS = {
    "interferon": "IRF1 GBP1 GBP2 GBP4 GBP5 PSMB8 PSMB9 TAP1 TAP2 UBE2L6 WARS1 IFI30 IFI35 CXCL9 CXCL10 HLA-E B2M SOCS1 CD274 LAP3",
    "TGF-beta": "SERPINE1 TGFBI SKIL SMAD7 CCN1 CCN2 COL1A1 COL4A1 FN1 THBS1 LTBP2 PMEPA1 TAGLN ACTA2 ITGB6 BHLHE40 ID1 LMCD1",
    "proliferation": "MKI67 TOP2A CDK1 CCNB1 CCNB2 TYMS RRM2 PCNA MCM2 MCM3 MCM5 BIRC5 AURKA AURKB TK1 UBE2C CENPF NUSAP1",
    "oxidative stress": "NQO1 HMOX1 GCLM GCLC TXNRD1 SRXN1 SLC7A11 G6PD TALDO1 TKT ME1 FTL FTH1 AKR1B10 OSGIN1 ABCC2",
}
# What each knock-out does to each program, in basal standard deviations. The last eight genes are silent in these cells.
KNOCKOUTS: dict[str, dict[str, float]] = {
    "IFNGR1": {"interferon": -3.2},
    "IFNGR2": {"interferon": -3.0},
    "JAK2": {"interferon": -3.4},
    "STAT1": {"interferon": -3.6},
    "SMAD4": {"TGF-beta": -3.2},
    "TGFBR2": {"TGF-beta": -2.8},
    "MYC": {"proliferation": -3.0},
    "KEAP1": {"oxidative stress": 3.4},
    **{gene: {} for gene in ("ALB", "CRYAA", "GH1", "INS", "KRT5", "MYH7", "OR1A1", "RHO")},
}
DOUBLES = ("IFNGR1+SMAD4", "JAK2+KEAP1", "MYC+TGFBR2", "RHO+STAT1")
HOUSEKEEPING = "ACTB GAPDH EEF1A1 TPT1 TMSB4X MALAT1 RPLP0 RPLP1 RPL3 RPL10 RPL13 RPS2 RPS6 RPS18 MT-CO1 MT-ND4"
N_GENES = 200


def demo_screen(seed: int = 0) -> ad.AnnData:
    """3,000 cells x 200 genes of sparse counts, of which everything is known.

    300 control cells, 16 single knock-outs (130 cells each) and 4 double ones (155 each) in two technical batches. Four programs, each
    with marker genes: four knock-outs share the interferon program, two share the TGF-beta program, MYC and KEAP1 have one of their
    own, and eight do nothing. ``u = z + shift`` with ``z ~ N(0, I)``; log rates are linear in ``u``, doubles add, counts are negative
    binomial (theta = 3) at log-normal libraries of about 400.

    Returns:
        AnnData with ``obs["perturbation"]``, ``obs["batch"]``, ``var["program"]`` (of which a gene is a marker, or ""), and the truth
        as in :mod:`pyrocausal.simulate`; ``uns["truth"]["programs"]`` names the columns of mask and effect.
    """
    rng = np.random.default_rng(seed)
    programs, names = list(PROGRAMS), sorted(KNOCKOUTS)
    effect = np.array([[KNOCKOUTS[name].get(program, 0.0) for program in programs] for name in names])
    labels_of = ["control", *names, *DOUBLES]
    shift = np.zeros((len(labels_of), len(programs)))
    shift[1 : 1 + len(names)] = effect
    for k, label in enumerate(DOUBLES, start=1 + len(names)):
        shift[k] = sum(effect[names.index(part)] for part in label.split("+"))
    code = np.repeat(np.arange(len(labels_of)), [300, *[130] * len(names), *[155] * len(DOUBLES)])

    genes, program_of, loading, mean = _genes(rng)
    u = rng.standard_normal((len(code), len(programs))) + shift[code]
    batch = rng.integers(0, 2, len(code))
    offset = np.outer(batch, rng.normal(0, 0.25, len(genes)))
    logits = np.log(mean) + u @ loading + offset
    rate = np.exp(logits - logits.max(1, keepdims=True))
    rate = rate / rate.sum(1, keepdims=True) * rng.lognormal(np.log(400), 0.3, (len(code), 1))
    theta = 3.0
    x = sp.csr_matrix(rng.poisson(rate * rng.gamma(theta, 1 / theta, rate.shape)).astype(np.float32))
    labels = np.array(labels_of, dtype=object)[code]
    settings = {"simulator": "demo", "seed": seed}
    out = _screen(x, labels, u, rate, (effect != 0).astype(float), effect, names, genes, "counts", settings)
    out.uns["truth"]["programs"] = np.array(programs, dtype=object)
    out.obs["batch"] = [f"lane {b + 1}" for b in batch]
    out.obs["batch"] = out.obs["batch"].astype("category")
    out.var["program"] = program_of
    return out


def _genes(rng: np.random.Generator) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Names, program (or ""), loadings [n_programs, n_genes] and mean expression [n_genes] of the genes."""
    markers = {program: text.split() for program, text in PROGRAMS.items()}
    housekeeping = HOUSEKEEPING.split()
    n_markers = sum(len(m) for m in markers.values())
    n_filler = N_GENES - n_markers - len(housekeeping)
    genes = [*(g for m in markers.values() for g in m), *housekeeping, *(f"GENE{i + 1:03d}" for i in range(n_filler))]
    program_of = [program for program, m in markers.items() for _ in m] + [""] * (N_GENES - n_markers)
    loading = np.zeros((len(markers), N_GENES))
    for j, program in enumerate(markers):
        member = np.array([p == program for p in program_of])
        loading[j, member] = rng.uniform(0.35, 0.75, member.sum())
    mean = rng.lognormal(-1.8, 1.0, N_GENES)
    mean[:n_markers] = rng.lognormal(-0.7, 0.6, n_markers)
    mean[[genes.index(g) for g in housekeeping]] = rng.lognormal(3.4, 0.5, len(housekeeping))
    return genes, program_of, loading, mean
