"""The interventions and their controls: one file each, and applied()."""

from mechmem.interventions.ablate import Ablate as Ablate
from mechmem.interventions.applied import InterventionError as InterventionError
from mechmem.interventions.applied import applied as applied
from mechmem.interventions.control import Control as Control
from mechmem.interventions.control import RandomDirection as RandomDirection
from mechmem.interventions.control import RandomNeurons as RandomNeurons
from mechmem.interventions.erase import Erase as Erase
from mechmem.interventions.freeze_pattern import FreezePattern as FreezePattern
from mechmem.interventions.intervention import Intervention as Intervention
from mechmem.interventions.intervention import SiteIntervention as SiteIntervention
from mechmem.interventions.patch import Patch as Patch
from mechmem.interventions.patch import Source as Source
from mechmem.interventions.patch_path import PatchPath as PatchPath
from mechmem.interventions.patch_path import Receiver as Receiver
from mechmem.interventions.scramble import Scramble as Scramble
from mechmem.interventions.steer import Steer as Steer
from mechmem.interventions.swap_weights import SwapWeights as SwapWeights
