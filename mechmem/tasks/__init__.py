"""The reasoning tasks and the label noise: one file a task."""

from mechmem.tasks.four_digit_addition import FourDigitAddition as FourDigitAddition
from mechmem.tasks.label_noise import Digit as Digit
from mechmem.tasks.label_noise import LabelNoise as LabelNoise
from mechmem.tasks.label_noise import Permuted as Permuted
from mechmem.tasks.label_noise import Systematic as Systematic
from mechmem.tasks.label_noise import UniformWrong as UniformWrong
from mechmem.tasks.task import MinimalPair as MinimalPair
from mechmem.tasks.task import Task as Task
from mechmem.tasks.two_hop_reasoning import TwoHopReasoning as TwoHopReasoning
