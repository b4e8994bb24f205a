"""The interventions and their controls: one file each, and applied()."""

from mechmem.interventions.applied import InterventionError as InterventionError
from mechmem.interventions.applied import applied as applied
from mechmem.interventions.control import Control as Control
from mechmem.interventions.control import RandomDirection as RandomDirection
from mechmem.interventions.control import RandomNeurons as RandomNeurons
from mechmem.interventions.intervention import Intervention as Intervention
from mechmem.interventions.patch import Patch as Patch
from mechmem.interventions.patch import Source as Source
from mechmem.interventions.scramble import Scramble as Scramble
