"""What every artifact of a run is made from: the `Request` that names its fingerprint.

`Outline` gives what follows from the recipe alone; `status` and the job graph use only that part.
This file also hashes the teacher, its tokenizer and local data, each once per lineage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.artifacts import Request
from xlstm_distill.artifacts.hashing import hash_if_there, take_hashes
from xlstm_distill.data.budget import expert_rows, rows_needed
from xlstm_distill.runtime.ranks import from_rank_zero, process_count
from xlstm_distill.stages.outline import NOT_IN_TARGETS, TEACHER, Outline, part, stage_of

if TYPE_CHECKING:
    from xlstm_distill.targets.shard import Identity


class Lineage(Outline):
    """The artifacts of a recipe, and what each of them is made from."""

    def share_hashes(self) -> None:
        """Take all hashes of files from rank 0; all ranks call it before they ask for a request.

        64 ranks would else read a teacher of 16 GB 64 times, and the answer would be another one
        where a machine's own copy differs.
        """
        if process_count() == 1:
            return
        shared = from_rank_zero(self._hashes)
        # A cached property is set like any attribute.
        self.teacher_hash, self.tokenizer_hash = shared["teacher"], shared["tokenizer"]
        take_hashes(shared["paths"])

    def _hashes(self) -> dict[str, Any]:
        evaluate = self.recipe.evaluate
        paths: list[str] = [str(evaluate.include or "")]
        if evaluate.long_context is not None:
            paths.append(str(evaluate.long_context.haystack or ""))
        if evaluate.judge is not None:
            paths.append(evaluate.judge.questions)
        for merge in (self.recipe.merge, *self.recipe.merge.variants.values()):
            paths.append(str(merge.tuning.include or ""))
        for domain in self.recipe.data.domains.values():
            paths += [source.path for source in domain.sources if source.path is not None]
        return {
            "teacher": self.teacher_hash,
            "tokenizer": self.tokenizer_hash,
            "paths": {path: hash_if_there(Path(path)) for path in paths if path},
        }

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        from xlstm_distill.models.teacher import load_tokenizer

        return load_tokenizer(self.recipe.teacher)

    @functools.cached_property
    def tokenizer_hash(self) -> str:
        """Hash of what the tokenizer does."""
        from xlstm_distill.data.prepare import tokenizer_hash

        return tokenizer_hash(self.tokenizer)

    @functools.cached_property
    def teacher_hash(self) -> str:
        """Hash of the teacher's files and settings."""
        from xlstm_distill.models.teacher import teacher_hash

        return teacher_hash(self.recipe.teacher)

    @functools.cache  # noqa: B019  (a lineage lives as long as the program's one command)
    def request(self, label: str) -> Request:
        """What an artifact is made from; its fingerprint follows from this.

        Rows are the exception: an artifact may hold more than this recipe needs, so that
        `data.prepare.prepare_domain` makes their request, and others depend on their identity.
        """
        stage, _, name = label.partition("/")
        keys = self.recipe_keys(label)
        if stage == "data":
            from xlstm_distill.data.prepare import data_request

            rows = rows_needed(self.recipe, name, self.captured)
            request = data_request(self.recipe, name, self.tokenizer_hash, rows=rows)
            return replace(
                request, identity=self.data_identity(name), keys=keys, notes=self.notes(label)
            )
        if stage == "capture":
            request = self._capture_request(name, rows=self.captured[name])
            return replace(
                request, identity=self.capture_identity(name), keys=keys, notes=self.notes(label)
            )
        return Request(
            stage,
            parts=self.settings(label),
            inputs=self._inputs(stage, name),
            name=name or None,
            keys=keys,
            notes=self.notes(label),
        )

    def _inputs(self, stage: str, name: str) -> dict[str, str]:
        """Identities of all that a stage after the capture reads."""
        if stage == "align":
            return {"teacher": self.teacher_hash, **self.data_inputs(self.aligned_domains())}
        if stage == "distill":
            domains = expert_rows(self.recipe, name)
            stored = domains if self.recipe.capture.targets == "stored" else {}
            return {
                "align": self.request("align").fingerprint,
                "teacher": self.teacher_hash,
                **{f"capture/{domain}": self.capture_identity(domain) for domain in stored},
                **self.data_inputs(domains),
            }
        if stage == "refine":
            return {
                # As in the expert's own manifest: what it was trained from in the first place.
                "align": self.request("align").fingerprint,
                f"distill/{name}": self.request(f"distill/{name}").fingerprint,
                "teacher": self.teacher_hash,
                **self.data_inputs(expert_rows(self.recipe, name)),
            }
        if stage == "evaluate":
            return self._evaluation_inputs(name)
        label = f"{stage}/{name}" if name else stage
        found: dict[str, str] = {}
        for need in self.needs(label):
            rows = stage_of(need) == "data"
            domain = need.partition("/")[2]
            found[need] = self.data_identity(domain) if rows else self.request(need).fingerprint
        if stage in ("merge", "variant") and self.merge(label).found == "tuned":
            found |= self._tuning_inputs(self.merge(label).tuning.include)
        return found

    def _tuning_inputs(self, include: str | None) -> dict[str, str]:
        """What weights are tuned against, besides the experts."""
        found = {"teacher": self.teacher_hash}
        if include is not None:
            found["tasks"] = str(hash_if_there(Path(include)))
        return found

    def _evaluation_inputs(self, model: str) -> dict[str, str]:
        if model == TEACHER:
            inputs = {"teacher": self.teacher_hash}
        else:
            made = self.request(self.model_label(model))
            inputs = {f"{made.stage}/{model}": made.fingerprint}
            inputs |= self.data_inputs(self.recipe.data.domains)  # its gates are measured on them
        if self.recipe.evaluate.include is not None:
            inputs["tasks"] = self._tasks_hash
        judge = self.recipe.evaluate.judge
        if judge is not None:
            # A data set of the hub is named by itself.
            there = hash_if_there(Path(judge.questions))
            inputs["questions"] = str(there or f"{judge.questions}/{judge.split}")
        long = self.recipe.evaluate.long_context
        if long is not None and long.haystack is not None:
            inputs["haystack"] = str(hash_if_there(Path(long.haystack)))
        return inputs

    @functools.cached_property
    def _tasks_hash(self) -> str:
        # Validation has seen to it that the folder is there, on rank 0 at least.
        return str(hash_if_there(Path(str(self.recipe.evaluate.include))))

    def data_inputs(self, names: Iterable[str]) -> dict[str, str]:
        """Identities of packed rows, as inputs of a stage; the rows need not be there."""
        return {f"data/{name}": self.data_identity(name) for name in names}

    @functools.cache  # noqa: B019
    def data_identity(self, domain: str) -> str:
        """Hash of what a domain's rows are, however many of them there are."""
        from xlstm_distill.data.prepare import data_identity

        return data_identity(self.recipe, domain, self.tokenizer_hash)

    def capture_identity(self, domain: str) -> str:
        """Hash of what a domain's targets are, for however many rows they were captured."""
        return self._capture_request(domain).fingerprint

    def _capture_request(self, domain: str, **counts: int) -> Request:
        from xlstm_distill.targets.shard import VERSION

        kept = part(self.recipe.capture, *NOT_IN_TARGETS, "targets")
        return Request(
            "capture",
            name=domain,
            # Files of another format must be captured again.
            parts={**kept, "store": VERSION, **counts},
            inputs={"teacher": self.teacher_hash, **self.data_inputs([domain])},
        )

    def store_identity(self, domain: str) -> Identity:
        """What every shard of a domain's targets says it was made from."""
        from xlstm_distill.targets.shard import Identity

        capture, teacher = self.recipe.capture, self.recipe.teacher
        return Identity(
            domain=domain,
            data=self.data_identity(domain),
            tokenizer=self.tokenizer_hash,
            teacher=self.teacher_hash,
            revision=teacher.revision,
            dtype=teacher.dtype,
            top_k=capture.top_k,
            mass=capture.mass,
            min_k=capture.min_k,
        )
