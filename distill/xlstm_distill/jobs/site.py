"""The site file: what a cluster wants to know of each stage's jobs. Checked like a recipe."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.fields import Count, CountOrZero, FieldError, Section
from xlstm_distill.recipe.load import parse_yaml, read_file
from xlstm_distill.recipe.problems import kind_of, problem_lines
from xlstm_distill.recipe.shipped import recipes_folder

Stage = Literal["prepare", "capture", "align", "distill", "refine", "merge", "evaluate", "report"]
# A merge takes several processes only where it says so: its weights may be tuned.
LAUNCHED = ("capture", "align", "distill", "refine", "evaluate")
"""Stages that run in several processes; the others run in one."""
SHARED = ("prepare", "capture")
"""Stages whose number of array tasks is chosen; the others have one for each expert or model."""
CAPTURE_TASKS = 4
"""Shares of a capture where the site file names no number."""
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
OURS = (
    *("array", "chdir", "dependency", "error", "job-name", "kill-on-invalid-dep", "open-mode"),
    *("no-requeue", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"),
)
"""Options of sbatch that the scripts give themselves."""
NAMED = ("account", "cpus-per-task", "gres", "mem", "nodes", "partition", "qos", "time")
"""Options of sbatch that have a key of their own."""


def _option(value: str) -> str:
    """Check text that stands in a line of sbatch options."""
    if not value.isprintable() or any(sign in value for sign in "\"'\\"):
        raise FieldError("", f"{value!r} must be one line without quotes and backslashes.")
    return value


def _time(value: Any) -> Any:
    """Refuse what YAML makes of an unquoted time, and what is no time of Slurm's."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise FieldError(
            "", f"{value!r} is a number (YAML reads 4:00:00 as one); put the time in quotes."
        )
    if isinstance(value, str) and seconds_of(value) is None:
        raise FieldError(
            "",
            f"{value!r} is no time limit; write minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds, in quotes: '12:00:00'.",
        )
    return value


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit as sbatch reads it; None if it is none.

    `30` are minutes, `30:00` minutes and seconds, `1-12` days and hours.
    """
    match = TIME.fullmatch(time)
    if match is None:
        return None
    parts = [int(part) for part in match.groups()[1:] if part is not None]
    if match[1] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(match[1]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)


def _extra(value: str) -> str:
    """Check a further option of sbatch."""
    match = re.fullmatch(r"--([a-z0-9-]+)(=.+)?", _option(value))
    if match is None:
        raise FieldError("", f"{value!r} must be a long option of sbatch: '--constraint=a100'.")
    if match[1] in OURS:
        raise FieldError("", f"'--{match[1]}' is given by the script itself; leave it out.")
    if match[1] in NAMED:
        raise FieldError("", f"'--{match[1]}' has a key of its own; leave it out here.")
    return value


def _launch(value: str, info: ValidationInfo) -> str:
    """Find a launch configuration: a path from the site file on, or the name of a shipped one."""
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if path.is_file():
        return str(path.resolve())
    shipped = {file.stem: file for file in (recipes_folder() / "accelerate").glob("*.yaml")}
    if value in shipped:
        return str(shipped[value])
    raise FieldError(
        "",
        f"{value!r} is no file (looked for {path}) and no shipped configuration; those are "
        f"{', '.join(sorted(shipped))}.",
    )


def _venv(value: str, info: ValidationInfo) -> str:
    """Make the folder of a virtual environment absolute."""
    folder: Path | None = (info.context or {}).get("folder")
    if folder is None:
        return value
    path = folder / Path(value).expanduser()
    if not (path / "bin" / "activate").is_file():
        raise FieldError("", f"{value!r} is no virtual environment (no {path}/bin/activate).")
    # Not resolved: an environment may be a link that is moved to a newer one.
    return str(path.absolute())


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise FieldError("", f"{name!r} cannot name a variable of the environment.")
    return name


def _plain(value: str) -> str:
    """Check a word of a command: it is quoted for the shell, so that it only must be one line."""
    if not value.isprintable():
        raise FieldError("", f"{value!r} must be one line.")
    return value


Option = Annotated[str, Field(min_length=1), AfterValidator(_option)]
Word = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
Words = Annotated[tuple[Word, ...], Field(min_length=1)]


class Settings(Section):
    """What Slurm should give the jobs of a stage."""

    account: Option | None = Field(default=None, description="Account to charge.")
    partition: Option | None = Field(default=None, description="Partition, or several: a,b.")
    qos: Option | None = Field(default=None, description="Quality of service.")
    time: Annotated[str, BeforeValidator(_time)] | None = Field(
        default=None, description="Time limit of a job, in quotes: '12:00:00' or '2-00:00:00'."
    )
    nodes: Count = Field(default=1, description="Nodes of a job; several need `launch`.")
    gres: Option | None = Field(default=None, description="Devices of each node: gpu:8.")
    cpus: Count | None = Field(default=None, description="Cores of each node.")
    memory: Option | None = Field(default=None, description="Memory of each node: 200G; 0 is all.")
    launch: Annotated[str, AfterValidator(_launch)] | None = Field(
        default=None,
        description="Configuration of accelerate launch: a path, or a name as fsdp2.",
    )
    processes: Count | None = Field(
        default=None, description="Processes on each node (GPUs), where `launch` is given."
    )
    launch_args: Annotated[str, AfterValidator(_plain)] = Field(
        default="", description="More options of accelerate launch."
    )
    tasks: Count | None = Field(
        default=None, description="Array tasks that share `prepare` or `capture`."
    )
    at_once: Count | None = Field(default=None, description="Array tasks that may run at once.")
    extra: tuple[Annotated[str, AfterValidator(_extra)], ...] = Field(
        default=(), description="More options of sbatch: --constraint=a100."
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield the options that are given twice."""
        names = [option.partition("=")[0] for option in self.extra]
        for name in dict.fromkeys(names):
            if names.count(name) > 1:
                yield FieldError("extra", f"{name} is given twice; keep one.")


class Site(Section):
    """How a cluster runs the jobs of a run."""

    defaults: Settings = Field(
        default_factory=Settings, description="Settings of every stage that does not name its own."
    )
    stages: dict[Stage, Settings] = Field(
        default_factory=dict, description="Settings of single stages, over `defaults`."
    )
    modules: tuple[Word, ...] = Field(default=(), description="Environment modules to load.")
    venv: Annotated[str, AfterValidator(_venv)] | None = Field(
        default=None, description="Virtual environment to activate."
    )
    environment: dict[Annotated[str, AfterValidator(_variable)], str] = Field(
        default_factory=dict, description="Variables of the environment."
    )
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines to run before the command, as they are."
    )
    container: tuple[Word, ...] = Field(
        default=(), description="Words before the command: apptainer exec --nv IMAGE."
    )
    program: Words = Field(default=("xlstm-distill",), description="Words that start the program.")
    srun: tuple[Word, ...] = Field(
        default=(), description="Options of srun; with them also jobs of one node use srun."
    )
    signal_seconds: Count = Field(
        default=300, description="Seconds before the time limit at which a training is to stop."
    )
    requeues: CountOrZero = Field(
        default=50, description="How often a job puts itself back into the queue at most."
    )

    def settings(self, stage: str) -> Settings:
        """Settings of a stage, defaults included."""
        merged = self.defaults.model_dump(exclude_unset=True, exclude={"tasks"})
        if stage not in LAUNCHED:
            for key in ("nodes", "launch", "processes", "launch_args"):
                merged.pop(key, None)
        own = self.stages.get(stage)  # type: ignore[call-overload]
        merged |= own.model_dump(exclude_unset=True) if own is not None else {}
        return Settings.model_construct(**{**Settings().model_dump(), **merged})

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield what does not fit together, by the key to change."""
        if self.defaults.tasks is not None:
            yield FieldError("defaults.tasks", f"it is for stages {' and '.join(SHARED)} alone.")
        for stage, own in self.stages.items():
            yield from _misplaced(stage, own)
        for stage in Stage.__args__:  # type: ignore[attr-defined]
            yield from self._unfit(stage)

    def _unfit(self, stage: str) -> Iterator[FieldError]:
        settings = self.settings(stage)
        field = f"stages.{stage}"
        if settings.nodes > 1 and settings.launch is None:
            yield FieldError(f"{field}.launch", f"missing: {settings.nodes} nodes need it. Add it.")
        if settings.nodes > 1 and settings.processes is None:
            yield FieldError(
                f"{field}.processes", "missing: several nodes need it (GPUs of a node). Add it."
            )
        if settings.launch is None and (settings.processes or settings.launch_args):
            yield FieldError(f"{field}.launch", "missing: processes and launch_args need it.")
        limit = seconds_of(settings.time) if settings.time is not None else None
        if limit is not None and self.signal_seconds >= limit:
            yield FieldError(
                "signal_seconds",
                f"{self.signal_seconds} must be below the time limit of {stage} ({settings.time}).",
            )


def _misplaced(stage: str, own: Settings) -> Iterator[FieldError]:
    """Yield keys that a stage has no use for."""
    given = own.model_fields_set
    if stage not in SHARED and own.tasks is not None:
        yield FieldError(
            f"stages.{stage}.tasks", f"it is for stages {' and '.join(SHARED)} alone; remove it."
        )
    if stage not in (*LAUNCHED, "merge"):
        for key in ("nodes", "launch", "processes", "launch_args"):
            if key in given and (key != "nodes" or own.nodes != 1):
                yield FieldError(
                    f"stages.{stage}.{key}", f"{stage} runs in one process; remove it."
                )


def load_site(path: Path) -> Site:
    """Read and check a site file; its paths are relative to its folder and come back absolute.

    Raises:
        UserError: all problems, one line each.
    """
    data = parse_yaml(read_file(path, "site file"), str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: contains {kind_of(data)}; a site file is a mapping such as "
            "slurm/site.example.yaml."
        )
    return check_site(data, path.resolve().parent, path)


def check_site(data: Mapping[str, Any], folder: Path | None, path: Path) -> Site:
    """Check the content of a site file; `path` is its name in messages.

    Raises:
        UserError: all problems, one line each.
    """
    try:
        return Site.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        lines = problem_lines(error, Site, "site file")
        lines += _further_problems(data, error, folder)
        raise UserError(*(f"{path}: {line}" for line in dict.fromkeys(lines))) from None


def _further_problems(
    data: Mapping[str, Any], error: ValidationError, folder: Path | None
) -> list[str]:
    """Check what fits together without the keys that are wrong by themselves.

    pydantic looks at rules between keys only when every key is valid. The user would mend the keys,
    and only the next call would show the rest.
    """
    rest = copy.deepcopy(dict(data))
    wrong: set[str] = set()
    for problem in error.errors():
        # After a key that is not allowed, pydantic adds a part that is no key: "[key]".
        keys = [part for part in problem["loc"] if part != "[key]"]
        wrong.add(str(keys[-1]) if keys else "")
        _remove(rest, keys)
    try:
        Site.model_validate(rest, context={"folder": folder})
    except ValidationError as further:
        lines = problem_lines(further, Site, "site file")
        # A key that was taken out is not missing.
        return [line for line in lines if line.partition(":")[0].split(".")[-1] not in wrong]
    return []


def _remove(data: Any, keys: list[int | str]) -> None:
    """Take a key out of nested mappings, or the whole list that it is an index of."""
    for key in keys[:-1]:
        below = data.get(key) if isinstance(data, dict) else None
        if not isinstance(below, dict):
            keys = [key]
            break
        data = below
    if keys and isinstance(data, dict):
        data.pop(keys[-1], None)


def site_to_yaml(site: Site) -> str:
    """Write a site with what was given; `load_site` reads it back equal."""
    values = site.model_dump(mode="json", exclude_unset=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
