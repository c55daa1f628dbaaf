"""What a run is made from: the recipe, its sections, and how it is read. Loads no torch."""

from xlstm_distill.recipe.data import Data, Domain, Source
from xlstm_distill.recipe.evaluation import EvalTask, Evaluate, Report, SpeedSettings
from xlstm_distill.recipe.load import load_recipe
from xlstm_distill.recipe.merging import Merge, MergeSettings
from xlstm_distill.recipe.model import MixerConfig, Student, Teacher
from xlstm_distill.recipe.recipe import Recipe
from xlstm_distill.recipe.refining import Refine
from xlstm_distill.recipe.training import (
    Align,
    Capture,
    Distill,
    Expert,
    Optimization,
    Phase,
    Training,
)

__all__ = [
    "Align", "Capture", "Data", "Distill", "Domain", "EvalTask", "Evaluate", "Expert", "Merge",
    "MergeSettings", "MixerConfig", "Optimization", "Phase", "Recipe", "Refine", "Report",
    "Source", "SpeedSettings", "Student", "Teacher", "Training", "load_recipe",
]  # fmt: skip
