"""What artifacts a recipe has, what each is built on, and which settings it reads.

All of it follows from the recipe alone and loads neither torch nor a tokenizer: which artifacts
there are (`labels`), what each is built on (`needs`), which settings it reads (`settings`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.changes import changed_settings
from xlstm_distill.data.budget import (
    captured_rows,
    expert_rows,
    keys_of_rows,
    notes_of_rows,
    rows_needed,
    rows_to_align,
)
from xlstm_distill.recipe import MergeSettings, Recipe
from xlstm_distill.recipe.merging import DEFAULT_SCALE, WITH_DENSITY, WITH_SCALE
from xlstm_distill.recipe.shown import shown_values
from xlstm_eval.answering.batches import PROTOCOL
from xlstm_eval.long_context.settings import VERSION as LONG_CONTEXT

TEACHER, MERGED = "teacher", "merged"
"""Models that are evaluated besides the experts."""
STAGES = ("data", "capture", "align", "distill", "refine", "merge", "variant", "evaluate", "report")
"""What an artifact's label begins with, in the order in which stages follow each other."""
ALIGN_METHOD = 2
"""Version of how stage I computes. 2: output gates read values of RMS 1 while they train."""
MERGE_KEYS = ("method", "weights", "scale", "density", "layer_groups", "tuning", "learning")
MERGE_RECIPE_KEYS = {
    "experts": "distill.experts",
    "dtype": "teacher.dtype",
    "protocol": "the evaluation's protocol",
    "apply_chat_template": "evaluate.apply_chat_template",
    "top_k": "capture.top_k",
}
"""Recipe keys of what only merges with weights that are found depend on."""
NOT_IN_FINGERPRINT = ("micro_batch", "non_finite", "activation_checkpointing")
"""Keys of a training that may change while it is under way: neither changes what is trained."""
NOT_IN_REFINEMENT = (*NOT_IN_FINGERPRINT, "sample_batch", "shard_teacher")
"""Keys of a refinement that may change while it is under way."""
NOT_IN_TARGETS = ("batch", "shard_teacher", "workers")
"""Keys of the capture that do not change what is captured."""


class Outline:
    """The artifacts of a recipe, from rows to report, and what depends on what."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @functools.cached_property
    def captured(self) -> dict[str, int]:
        """Rows of each domain that some expert reads."""
        return captured_rows(self.recipe)

    def labels(self) -> list[str]:
        """Labels of all artifacts (`stage` or `stage/name`), each after what it is built on."""
        recipe = self.recipe
        captured = self.captured if recipe.capture.targets == "stored" else {}
        return [
            *(f"data/{name}" for name in recipe.data.domains),
            *(f"capture/{name}" for name in captured),
            "align",
            *(f"distill/{name}" for name in recipe.distill.experts),
            *(f"refine/{name}" for name in self.refined()),
            "merge",
            *(f"variant/{name}" for name in recipe.merge.variants),
            *(f"evaluate/{name}" for name in self.evaluated_models()),
            "report",
        ]

    def needs(self, label: str) -> list[str]:
        """Labels of the artifacts that one is built on directly."""
        recipe = self.recipe
        stage, _, name = label.partition("/")
        if stage == "capture":
            return [f"data/{name}"]
        if stage == "align":
            return [f"data/{domain}" for domain in self.aligned_domains()]
        if stage == "distill":
            domains = expert_rows(recipe, name)
            stored = domains if recipe.capture.targets == "stored" else {}
            return [
                "align",
                *(f"capture/{domain}" for domain in stored),
                *(f"data/{domain}" for domain in domains),
            ]
        if stage == "refine":
            domains = expert_rows(recipe, name)
            return ["align", f"distill/{name}", *(f"data/{domain}" for domain in domains)]
        if stage in ("merge", "variant"):
            experts = [self.expert_label(expert) for expert in recipe.distill.experts]
            merge = self.merge(label)
            # Learned weights match the experts on rows of their domains.
            rows = self.learned_rows() if merge.found == "learned" else {}
            seed = ["align"] if merge.method in WITH_SCALE else []
            return [*(f"data/{domain}" for domain in rows), *seed, *experts]
        if stage == "evaluate" and name != TEACHER:
            data = [f"data/{domain}" for domain in recipe.data.domains]
            return [self.model_label(name), *data]
        if stage == "report":
            return [f"evaluate/{model}" for model in self.evaluated_models()]
        return []

    def settings(self, label: str) -> dict[str, Any]:
        """The parts of the recipe that an artifact depends on, as JSON values."""
        recipe = self.recipe
        stage, _, name = label.partition("/")
        match stage:
            case "data":
                return {
                    "sources": [part(source) for source in recipe.data.domains[name].sources],
                    "context": recipe.data.context,
                    "long_documents": recipe.data.long_documents,
                    "seed": recipe.seed,
                    "rows": rows_needed(recipe, name, self.captured),
                }
            case "capture":
                kept = part(recipe.capture, *NOT_IN_TARGETS, "targets")
                return {**kept, "rows": self.captured[name]}
            case "align":
                return {
                    "align": part(recipe.align, *NOT_IN_FINGERPRINT),
                    "method": ALIGN_METHOD,
                    "mixer": mixer_part(recipe),
                    "seed": recipe.seed,
                }
            case "distill":
                return {
                    "distill": part(recipe.distill, "experts", *NOT_IN_FINGERPRINT),
                    "expert": part(recipe.distill.experts[name]),
                    "capture": part(recipe.capture, *NOT_IN_TARGETS),
                    "seed": recipe.seed,
                }
            case "refine":
                assert recipe.refine is not None
                return {
                    "refine": part(recipe.refine, "experts", *NOT_IN_REFINEMENT),
                    "seed": recipe.seed,
                }
            case "merge" | "variant":
                return self._merge_settings(self.merge(label))
            case "evaluate":
                # Changes are named in this order; the protocol's explains most of the others.
                return {
                    "protocol": PROTOCOL,
                    "evaluate": self._evaluate_settings(),
                    "dtype": recipe.teacher.dtype,
                    "seed": recipe.seed,
                }
            case "report":
                # As the report shows it, without folders: a run and its teacher may move.
                return {"report": part(recipe.report), "recipe": shown_values(recipe)}
        raise ValueError(f"{label!r} is no artifact of a run")

    def _evaluate_settings(self) -> dict[str, Any]:
        """The section `evaluate` as far as answers and scores depend on it."""
        found = part(self.recipe.evaluate, "include", "experts", "speed")
        # Consent changes no answer: `report` finds what `evaluate --run-code` has made.
        found["confirm_run_unsafe_code"] = False
        judge = found.pop("judge")
        if judge is not None:
            # Where it is reached changes no score. Its questions count by content, as an input.
            found["judge"] = {"model": judge["model"], "settings": judge["settings"]}
        for task in found["tasks"]:
            # It decides what the report compares, which reads it anew.
            del task["chance"]
        if found["long_context"] is None:
            # As in recipes of before there was such a key: their evaluations stay what they are.
            del found["long_context"]
        else:
            del found["long_context"]["haystack"]  # its content counts, which is an input
            found["long_context"]["version"] = LONG_CONTEXT
        return found

    def recipe_keys(self, label: str) -> dict[str, str]:
        """Recipe keys of those of `settings(label)` that have another name in the recipe."""
        stage, _, name = label.partition("/")
        capture = {key: f"capture.{key}" for key in part(self.recipe.capture)}
        capture["rows"] = f"rows of {name}"
        return {
            "data": keys_of_rows(name),
            "capture": capture,
            "align": {"mixer": "student.mixer", "method": "the method of stage I"},
            "distill": {"expert": f"distill.experts.{name}"},
            "refine": {},
            "merge": MERGE_RECIPE_KEYS | {key: f"merge.{key}" for key in MERGE_KEYS},
            "variant": MERGE_RECIPE_KEYS
            | {key: f"merge.variants.{name}.{key}" for key in MERGE_KEYS},
            "evaluate": {"dtype": "teacher.dtype", "protocol": "the evaluation's protocol"},
            "report": {"recipe": ""},
        }[stage]

    def notes(self, label: str) -> dict[str, Any]:
        """Settings behind the hashes that an artifact is built on; they go into its manifest."""
        stage, _, name = label.partition("/")
        if stage == "data":
            return notes_of_rows(self.recipe, name, self.captured)
        if stage in ("merge", "variant", "report") or (stage == "evaluate" and name != TEACHER):
            return {}
        teacher = part(self.recipe.teacher)
        if Path(self.recipe.teacher.path).is_absolute():
            del teacher["path"]  # its content counts: the same teacher may lie elsewhere
        return {"teacher": teacher}

    def identity_changes(self, label: str, manifest: Mapping[str, Any]) -> list[str]:
        """Say what changed of the rows or targets that others are built on.

        Their number does not count: the first are the same however many there are.
        """
        counted = f"rows of {label.partition('/')[2]} "
        found = [change for change in self.changes(label, manifest) if counted not in change]
        if stage_of(label) == "data" and manifest.get("notes"):
            found += changed_settings(manifest["notes"], self.notes(label), {})
        return found

    def changes(self, label: str, manifest: Mapping[str, Any]) -> list[str]:
        """Say which settings of a published artifact are not the recipe's, by their recipe keys.

        Files are not hashed: a change of the teacher's weights or of local data does not show.
        """
        now = self.settings(label)
        made_from = {key: value for key, value in manifest.get("recipe", {}).items() if key in now}
        if stage_of(label) == "data":
            # A manifest has hashes where the recipe has paths. More rows than needed are fine.
            now["sources"] = [_without_files(source) for source in now["sources"]]
            made_from["sources"] = [_without_files(s) for s in made_from.get("sources", [])]
            now["rows"] = max(now["rows"], int(made_from.get("rows", 0)))
        found = changed_settings(made_from, now, self.recipe_keys(label))
        if stage_of(label) != "data" and manifest.get("notes"):
            found += changed_settings(manifest["notes"], self.notes(label), {})
        return found

    def aligned_domains(self) -> dict[str, float]:
        """Domains that alignment reads, and their weights."""
        return dict(self.recipe.align.domains or dict.fromkeys(self.recipe.data.domains, 1.0))

    def aligned_rows(self) -> dict[str, int]:
        """Rows of each domain that alignment sees."""
        return {name: rows_to_align(self.recipe, name) for name in self.aligned_domains()}

    def learned_rows(self) -> dict[str, int]:
        """Rows of each domain that experts read, of which learned weights see some."""
        return captured_rows(self.recipe)

    def refined(self) -> list[str]:
        """Names of the experts that are refined after stage II."""
        refine = self.recipe.refine
        return [] if refine is None else refine.refined(self.recipe.distill)

    def expert_label(self, name: str) -> str:
        """Label of the artifact that holds an expert as it is merged and evaluated."""
        return f"refine/{name}" if name in self.refined() else f"distill/{name}"

    def merge(self, label: str) -> MergeSettings:
        """The recipe's settings of a merge, by its label."""
        _, _, name = label.partition("/")
        return self.recipe.merge.variants[name] if name else self.recipe.merge

    def _merge_settings(self, merge: MergeSettings) -> dict[str, Any]:
        """What a merge depends on: of its settings what its method and its weights take."""
        experts = self.recipe.distill.experts
        weights = merge.found or merge.weights_of(experts)
        found: dict[str, Any] = {"method": merge.method, "weights": weights}
        if merge.found is not None:
            found["experts"] = list(experts)
            found["layer_groups"] = merge.layer_groups
            found["seed"] = self.recipe.seed
            found["dtype"] = self.recipe.teacher.dtype
        if merge.found == "tuned":
            found["tuning"] = part(merge.tuning, "include")
            found["protocol"] = PROTOCOL
            found["apply_chat_template"] = self.recipe.evaluate.apply_chat_template
        if merge.found == "learned":
            found["learning"] = part(merge.learning)
            found["top_k"] = self.recipe.capture.top_k
        if merge.method in WITH_SCALE:
            found["scale"] = DEFAULT_SCALE if merge.scale is None else merge.scale
        if merge.method in WITH_DENSITY:
            found["density"] = merge.density
        if merge.method == "dare":
            found["seed"] = self.recipe.seed
        return found

    def evaluated_models(self) -> list[str]:
        """The teacher, the merged student, the experts where wanted, and further merges."""
        # The teacher first: `evaluate.check` takes its published evaluation as proof of good
        # settings.
        experts = self.recipe.distill.experts if self.recipe.evaluate.experts else ()
        # Variants last: a job array's index keeps its model when one is added.
        return [TEACHER, MERGED, *experts, *self.recipe.merge.variants]

    def model_label(self, model: str) -> str:
        """Label of the artifact that holds an evaluated student."""
        if model == MERGED:
            return "merge"
        return (
            f"variant/{model}" if model in self.recipe.merge.variants else self.expert_label(model)
        )


def part(model: Any, *exclude: str) -> dict[str, Any]:
    """A part of the recipe as JSON, for manifests and fingerprints."""
    return model.model_dump(mode="json", exclude=set(exclude) or None)


def mixer_part(recipe: Recipe) -> dict[str, Any]:
    """The mixer's settings, as in recipes of before there was kept attention where none is kept."""
    mixer = recipe.student.mixer
    return part(mixer, *(("attention",) if mixer.attention is None else ()))


def _without_files(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source's settings without those that a manifest gives as a hash of files."""
    return {key: value for key, value in source.items() if key not in ("path", "code")}


def stage_of(label: str) -> str:
    """The stage that makes an artifact."""
    return label.partition("/")[0]
