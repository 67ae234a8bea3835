"""The collection: one generative program per file, its guide in the file of the same name in :mod:`pyrocausal.guides`.

The module can be called: ``pc.models()`` is the collection as a table.
"""

import sys
from types import ModuleType
from typing import Any

from pyrocausal.collection import table
from pyrocausal.models.baselines import Baseline
from pyrocausal.models.cite_vae import CITEVAE
from pyrocausal.models.discrepancy_vae import DiscrepancyVAE
from pyrocausal.models.lcd import LCD
from pyrocausal.models.linear_lcd import LinearLCD
from pyrocausal.models.sams_vae import SAMSVAE
from pyrocausal.models.sccvae import SCCVAE, SCCVAEParity
from pyrocausal.models.scm import SCM
from pyrocausal.models.svae_plus import SVAEPlus

__all__ = ["CITEVAE", "LCD", "SAMSVAE", "SCCVAE", "SCM", "Baseline", "DiscrepancyVAE", "LinearLCD", "SCCVAEParity", "SVAEPlus"]


class _Collection(ModuleType):
    def __call__(self) -> Any:
        return table()


sys.modules[__name__].__class__ = _Collection
