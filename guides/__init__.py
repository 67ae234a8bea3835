"""The guide of each model of :mod:`pyrocausal.models`, in the file of the same name."""

from pyrocausal.guides.baselines import Baseline
from pyrocausal.guides.cite_vae import CITEVAE
from pyrocausal.guides.discrepancy_vae import DiscrepancyVAE
from pyrocausal.guides.lcd import LCD
from pyrocausal.guides.linear_lcd import LinearLCD
from pyrocausal.guides.sams_vae import SAMSVAE, SAMSVAECorrelated, SAMSVAEMeanField
from pyrocausal.guides.sccvae import SCCVAE, SCCVAEParity
from pyrocausal.guides.scm import SCM
from pyrocausal.guides.svae_plus import SVAEPlus, SVAEPlusParity

__all__ = [
    "CITEVAE",
    "LCD",
    "SAMSVAE",
    "SCCVAE",
    "SCM",
    "Baseline",
    "DiscrepancyVAE",
    "LinearLCD",
    "SAMSVAECorrelated",
    "SAMSVAEMeanField",
    "SCCVAEParity",
    "SVAEPlus",
    "SVAEPlusParity",
]
