"""Fixtures that several test files share."""

import os
from pathlib import Path

import anndata as ad
import pytest
import torch

from pyrocausal import simulate

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session")
def small_screen() -> ad.AnnData:
    """Sparse counts: 150 perturbed cells (30 of each of 5 perturbations) and 40 control cells, 30 genes. Copy it before changing it."""
    return simulate.svae_screen(
        n_perturbations=5, n_latent=4, cells_per_perturbation=30, n_genes=30, n_control=40, library_size=40.0, seed=0
    )


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real screens: the environment variable PYROCAUSAL_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("PYROCAUSAL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent; name the folder with PYROCAUSAL_DATA")
    return folder
