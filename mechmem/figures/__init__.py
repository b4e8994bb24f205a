"""The figures: one file each, from a saved table to a plotly figure; nothing here runs a model."""

from mechmem.figures.activation_maps import ActivationMaps as ActivationMaps
from mechmem.figures.bars import Bars as Bars
from mechmem.figures.circuit_graph import CircuitGraph as CircuitGraph
from mechmem.figures.curves import Curves as Curves
from mechmem.figures.faithfulness_curve import FaithfulnessCurve as FaithfulnessCurve
from mechmem.figures.figure import Figure as Figure
from mechmem.figures.heatmap import Heatmap as Heatmap
from mechmem.figures.scatter import Scatter as Scatter
from mechmem.figures.top_k_curve import TopKCurve as TopKCurve
