"""The measures: one file each."""

from mechmem.measures.accuracy import Accuracy as Accuracy
from mechmem.measures.kl import KL as KL
from mechmem.measures.logit import Logit as Logit
from mechmem.measures.logit_difference import LogitDifference as LogitDifference
from mechmem.measures.measure import Measure as Measure
from mechmem.measures.neither import Neither as Neither
from mechmem.measures.probability import Probability as Probability
from mechmem.measures.rank import Rank as Rank
