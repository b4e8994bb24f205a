"""The analyses: one file each."""

from mechmem.analyses.analysis import Analysis as Analysis
from mechmem.analyses.attribution import Attribution as Attribution
from mechmem.analyses.circuit import Circuit as Circuit
from mechmem.analyses.circuit_overlap import CircuitOverlap as CircuitOverlap
from mechmem.analyses.dynamics import Dynamics as Dynamics
from mechmem.analyses.edge_scores import EdgeScores as EdgeScores
from mechmem.analyses.effect import EffectAnalysis as EffectAnalysis
from mechmem.analyses.erasure import Erasure as Erasure
from mechmem.analyses.intervene import Intervene as Intervene
from mechmem.analyses.neuron_shift import NeuronShift as NeuronShift
from mechmem.analyses.neuron_shift import NeuronTopK as NeuronTopK
from mechmem.analyses.patch_grid import PatchGrid as PatchGrid
from mechmem.analyses.probe import Probe as Probe
