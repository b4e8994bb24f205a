"""mechmem: mechanistic interpretability of memorisation. Importing it loads nothing; each name loads when used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechmem.analyses import Ablation as Ablation
    from mechmem.analyses import ActivationMap as ActivationMap
    from mechmem.analyses import Analysis as Analysis
    from mechmem.analyses import Attribution as Attribution
    from mechmem.analyses import Circuit as Circuit
    from mechmem.analyses import CircuitOverlap as CircuitOverlap
    from mechmem.analyses import Concentration as Concentration
    from mechmem.analyses import Distributed as Distributed
    from mechmem.analyses import Dynamics as Dynamics
    from mechmem.analyses import EdgeScores as EdgeScores
    from mechmem.analyses import EffectAnalysis as EffectAnalysis
    from mechmem.analyses import Erasure as Erasure
    from mechmem.analyses import Heuristics as Heuristics
    from mechmem.analyses import HeuristicTypes as HeuristicTypes
    from mechmem.analyses import Intervene as Intervene
    from mechmem.analyses import LogitLens as LogitLens
    from mechmem.analyses import MapSimilarity as MapSimilarity
    from mechmem.analyses import NeuronShift as NeuronShift
    from mechmem.analyses import NeuronTopK as NeuronTopK
    from mechmem.analyses import PatchGrid as PatchGrid
    from mechmem.analyses import Probe as Probe
    from mechmem.analyses import TunedLens as TunedLens
    from mechmem.analyses import Twin as Twin
    from mechmem.api import load as load
    from mechmem.api import run as run
    from mechmem.api import train as train
    from mechmem.bench import Bench as Bench
    from mechmem.checkpoints import Trained as Trained
    from mechmem.component import Swept as Swept
    from mechmem.component import each as each
    from mechmem.examples import Examples as Examples
    from mechmem.experiment import CheckpointRef as CheckpointRef
    from mechmem.experiment import ExampleSet as ExampleSet
    from mechmem.experiment import Experiment as Experiment
    from mechmem.interventions import Ablate as Ablate
    from mechmem.interventions import Erase as Erase
    from mechmem.interventions import FreezePattern as FreezePattern
    from mechmem.interventions import Intervention as Intervention
    from mechmem.interventions import Patch as Patch
    from mechmem.interventions import PatchPath as PatchPath
    from mechmem.interventions import RandomDirection as RandomDirection
    from mechmem.interventions import RandomNeurons as RandomNeurons
    from mechmem.interventions import SiteIntervention as SiteIntervention
    from mechmem.interventions import Source as Source
    from mechmem.interventions import Steer as Steer
    from mechmem.interventions import SwapWeights as SwapWeights
    from mechmem.interventions import applied as applied
    from mechmem.measures import Measure as Measure
    from mechmem.models import Architecture as Architecture
    from mechmem.recipe import Phase as Phase
    from mechmem.recipe import Recipe as Recipe
    from mechmem.recipe import Training as Training
    from mechmem.tasks import FourDigitAddition as FourDigitAddition
    from mechmem.tasks import MinimalPair as MinimalPair
    from mechmem.tasks import TwoHopReasoning as TwoHopReasoning
    from mechmem.tasks import UniformWrong as UniformWrong

_HOMES = {
    "mechmem.analyses": (
        "Ablation",
        "ActivationMap",
        "Analysis",
        "Attribution",
        "Circuit",
        "CircuitOverlap",
        "Concentration",
        "Distributed",
        "Dynamics",
        "EdgeScores",
        "EffectAnalysis",
        "Erasure",
        "Heuristics",
        "HeuristicTypes",
        "Intervene",
        "LogitLens",
        "MapSimilarity",
        "NeuronShift",
        "NeuronTopK",
        "PatchGrid",
        "Probe",
        "TunedLens",
        "Twin",
    ),
    "mechmem.api": (
        "load",
        "run",
        "train",
    ),
    "mechmem.bench": ("Bench",),
    "mechmem.checkpoints": ("Trained",),
    "mechmem.component": (
        "Swept",
        "each",
    ),
    "mechmem.examples": ("Examples",),
    "mechmem.experiment": (
        "CheckpointRef",
        "ExampleSet",
        "Experiment",
    ),
    "mechmem.interventions": (
        "Ablate",
        "Erase",
        "FreezePattern",
        "Intervention",
        "Patch",
        "PatchPath",
        "RandomDirection",
        "RandomNeurons",
        "SiteIntervention",
        "Source",
        "Steer",
        "SwapWeights",
        "applied",
    ),
    "mechmem.measures": ("Measure",),
    "mechmem.models": ("Architecture",),
    "mechmem.recipe": (
        "Phase",
        "Recipe",
        "Training",
    ),
    "mechmem.tasks": (
        "FourDigitAddition",
        "MinimalPair",
        "TwoHopReasoning",
        "UniformWrong",
    ),
}
_HOME_OF = {name: home for home, members in _HOMES.items() for name in members}

__all__ = list(_HOME_OF)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"mechmem has no {name!r}; it has {', '.join(sorted(_HOME_OF))}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
