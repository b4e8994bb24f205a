"""The analyses: one file each."""

from mechmem.analyses.ablation import Ablation as Ablation
from mechmem.analyses.activation_map import ActivationMap as ActivationMap
from mechmem.analyses.analysis import Analysis as Analysis
from mechmem.analyses.attribution import Attribution as Attribution
from mechmem.analyses.circuit import Circuit as Circuit
from mechmem.analyses.circuit_overlap import CircuitOverlap as CircuitOverlap
from mechmem.analyses.concentration import Concentration as Concentration
from mechmem.analyses.distributed import Distributed as Distributed
from mechmem.analyses.dynamics import Dynamics as Dynamics
from mechmem.analyses.edge_scores import EdgeScores as EdgeScores
from mechmem.analyses.effect import EffectAnalysis as EffectAnalysis
from mechmem.analyses.erasure import Erasure as Erasure
from mechmem.analyses.grid import GridAnalysis as GridAnalysis
from mechmem.analyses.heuristic_types import HeuristicTypes as HeuristicTypes
from mechmem.analyses.heuristics import Heuristics as Heuristics
from mechmem.analyses.intervene import Intervene as Intervene
from mechmem.analyses.lens import LensAnalysis as LensAnalysis
from mechmem.analyses.logit_lens import LogitLens as LogitLens
from mechmem.analyses.map_similarity import MapSimilarity as MapSimilarity
from mechmem.analyses.neuron_shift import NeuronShift as NeuronShift
from mechmem.analyses.neuron_shift import NeuronTopK as NeuronTopK
from mechmem.analyses.patch_grid import PatchGrid as PatchGrid
from mechmem.analyses.probe import Probe as Probe
from mechmem.analyses.tuned_lens import TunedLens as TunedLens
from mechmem.analyses.twin import Twin as Twin
