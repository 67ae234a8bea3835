"""The guide of each model of :mod:`pyrocausal.models`, in the file of the same name."""

from pyrocausal.guides.sams_vae import SAMSVAE, SAMSVAECorrelated, SAMSVAEMeanField
from pyrocausal.guides.svae_plus import SVAEPlus, SVAEPlusParity

__all__ = ["SAMSVAE", "SAMSVAECorrelated", "SAMSVAEMeanField", "SVAEPlus", "SVAEPlusParity"]
