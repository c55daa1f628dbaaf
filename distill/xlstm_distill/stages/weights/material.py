"""What merge weights are found from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from xlstm_distill.artifacts import Artifact
from xlstm_distill.artifacts.files import write_text
from xlstm_distill.merging.groups import GroupedWeights, count_layers
from xlstm_distill.merging.merge import Sources
from xlstm_distill.merging.search import Weights
from xlstm_distill.recipe import MergeSettings
from xlstm_distill.stages.lineage import Lineage

PROGRESS = "search.json"


@dataclass(frozen=True)
class Material:
    """The recipe's settings, the experts, and the folder where what was found so far is kept."""

    lineage: Lineage
    label: str
    merge: MergeSettings
    experts: dict[str, Artifact]
    sources: Sources
    work: Path

    def keep_progress(self, step: int, steps: int) -> None:
        """Say in a file how many trials or steps are done; `status` reads it (rank 0 only)."""
        facts = {"label": self.label, "step": step, "steps": steps}
        write_text(self.work / PROGRESS, json.dumps(facts) + "\n")

    @property
    def made_from(self) -> str:
        """Fingerprint of all that the search depends on: settings, experts, teacher, tasks."""
        return self.lineage.request(self.label).fingerprint

    @property
    def layers(self) -> int:
        """Layers of the student."""
        return count_layers(next(iter(self.sources.experts.values())).entries)

    @property
    def key(self) -> str:
        """The merge's recipe key."""
        return recipe_key(self.label)

    def grouped(self, weights: Weights) -> GroupedWeights:
        """Name the experts of weights by group and expert."""
        sets = tuple(dict(zip(self.experts, group, strict=True)) for group in weights)
        return GroupedWeights(sets, self.layers)


def recipe_key(label: str) -> str:
    """The recipe key of a merge, by its label."""
    _, _, name = label.partition("/")
    return f"merge.variants.{name}" if name else "merge"
