"""Write the batch scripts of a run from the templates in `slurm/`."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xlstm_distill.artifacts.files import write_text
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.data.budget import captured_rows
from xlstm_distill.errors import UserError
from xlstm_distill.jobs.folder import PREFIX, Folder
from xlstm_distill.jobs.graph import TITLES, Job, array_words
from xlstm_distill.jobs.site import Settings, Site, site_to_yaml
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.load import recipe_to_yaml
from xlstm_distill.runtime.signals import EXIT_CODE

if TYPE_CHECKING:
    import jinja2

INSTALLED = "shipped_slurm"
"""Name of the folder `slurm/` inside the installed package (setup.py puts it there)."""
TEMPLATE = "job.sbatch.j2"
INDEX = '"$SLURM_ARRAY_TASK_ID"'
CHOSEN = '"${chosen[$SLURM_ARRAY_TASK_ID]}"'
CHOICES = {"distill": "--expert", "refine": "--expert", "evaluate": "--model"}
"""Options that take the name of what an array index makes."""
PLAIN = re.compile(r"[A-Za-z0-9_%@+=:,./&|()\[\]*!<>-]+")
"""Text that sbatch reads as one word without quotes."""


def templates_folder() -> Path:
    """Return the folder of the templates.

    A wheel holds it inside the package; in a checkout it is the top-level folder `slurm/`.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / INSTALLED, package.parents[1] / "slurm")
    for folder in candidates:
        if (folder / TEMPLATE).is_file():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise UserError(f"the Slurm templates are missing (looked in {looked}); install again.")


def job_name(recipe: Recipe, folder: Folder, job: str) -> str:
    """Name of a job in Slurm's queue: it tells the jobs of this run directory from all others."""
    return f"{recipe.name}.{job}.{digest(str(folder.run))[:8]}"


def edition(recipe: Recipe, job: Job) -> str:
    """What the indices of a job stand for; see `Submission`."""
    return digest([recipe_to_yaml(recipe), job.name, len(job.tasks)])[:12]


@dataclass(frozen=True)
class Writer:
    """Writes the scripts of a run, and all that they read, into its folder."""

    folder: Folder
    recipe: Recipe
    site: Site

    def write(self, jobs: Sequence[Job]) -> None:
        """Write recipe, site file, launch configurations, scripts and `jobs.json`.

        Raises:
            UserError: the path of the run directory cannot stand in a script.
        """
        _check_path(self.folder.run)
        self.folder.make()
        write_text(self.folder.recipe, recipe_to_yaml(self.recipe))
        site = self._with_own_launch(jobs)
        write_text(self.folder.site, site_to_yaml(site))
        template = _environment().get_template(TEMPLATE)
        entries = []
        for job in jobs:
            script = self.folder.script(job.name)
            write_text(script, self._script(template, job, site))
            entries.append(
                {
                    "name": job.name,
                    "script": script.name,
                    "array": self._array(job),
                    "depends_on": list(job.depends_on),
                }
            )
        self.folder.write_jobs(entries)

    def _array(self, job: Job) -> str | None:
        indices = [task.index for task in job.tasks if task.index is not None]
        at_once = self.site.settings(job.name).at_once
        return array_words(indices, at_once) if job.is_array else None

    def _with_own_launch(self, jobs: Sequence[Job]) -> Site:
        """Copy the launch configurations: an edited one must not change jobs that are queued."""
        stages = dict(self.site.stages)
        for job in jobs:
            named = self.site.settings(job.name).launch
            if named is None:
                continue
            source, copy = Path(named), self.folder.path / f"launch-{job.name}.yaml"
            if source != copy:
                try:
                    shutil.copyfile(source, copy)
                except OSError as error:
                    raise UserError(
                        f"stages.{job.name}.launch: {named!r} cannot be read ({error.strerror})."
                    ) from None
            own = stages.get(job.name, Settings())  # type: ignore[call-overload]
            stages[job.name] = own.model_copy(update={"launch": str(copy)})  # type: ignore[index]
        return self.site.model_copy(update={"stages": stages})

    def _script(self, template: jinja2.Template, job: Job, site: Site) -> str:
        settings = site.settings(job.name)
        gather = job.name == "distill" and self.recipe.capture.targets == "stored"
        return template.render(
            job=job,
            title=f"{self.recipe.name}: {TITLES[job.name]}",
            directives=[_directive(option) for option in self._options(job, settings)],
            site=site,
            settings=settings,
            run=str(self.folder.run),
            prefix=PREFIX,
            stopped=EXIT_CODE,
            gather=self._command("capture") if gather else [],
            captured=list(captured_rows(self.recipe)),
            command=[*self._command(job.name), *_choice(job), *_launch(settings)],
            chosen=[task.name for task in job.tasks] if job.name in CHOICES else [],
            srun=settings.nodes > 1 or bool(site.srun),
            arguments=launch_arguments(settings),
        )

    def _options(self, job: Job, settings: Settings) -> list[str]:
        """Options of sbatch that do not change from call to call."""
        # A percent sign begins a pattern in the name of a log.
        logs = str(self.folder.log(job.name, None).parent).replace("%", "%%")
        given = {
            "job-name": job_name(self.recipe, self.folder, job.name),
            "output": f"{logs}/{job.name}{'-%a' if job.is_array else ''}.log",
            "open-mode": "append",
            "chdir": str(self.folder.run),
            "account": settings.account,
            "partition": settings.partition,
            "qos": settings.qos,
            "time": settings.time,
            "nodes": str(settings.nodes),
            "ntasks-per-node": "1",
            "cpus-per-task": None if settings.cpus is None else str(settings.cpus),
            "mem": settings.memory,
            "gres": settings.gres,
            "array": self._array(job),
            "signal": f"B:USR1@{self.site.signal_seconds}",
            "kill-on-invalid-dep": "yes",
        }
        options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [*options, "--requeue", *settings.extra]

    def _command(self, stage: str) -> list[str]:
        """The command of a stage in one process, each word quoted for the shell."""
        words = [*self.site.container, *self.site.program, stage, str(self.folder.recipe)]
        # torchrun takes --run for an abbreviation of one of its own options.
        return [shlex.quote(word) for word in (*words, "--run-dir", str(self.folder.run))]


def _choice(job: Job) -> list[str]:
    """The words by which a task of the job takes its part; they are shell, already quoted."""
    if job.name in ("prepare", "capture"):
        return ["--shard", f"{INDEX}/{len(job.tasks)}"]
    # By name: commands take an index too, but an expert that is called `1` comes before it.
    return [CHOICES[job.name], CHOSEN] if job.name in CHOICES else []


def _launch(settings: Settings) -> list[str]:
    """The words that start a command in several processes; none where it runs in one."""
    if settings.launch is None:
        return []
    words = ["--launch", settings.launch]
    # On several nodes the template adds these, with each node's number.
    if settings.nodes == 1 and (arguments := launch_arguments(settings)):
        words += ["--launch-args", arguments]
    return [shlex.quote(word) for word in words]


def launch_arguments(settings: Settings) -> str:
    """Options of accelerate launch that are the same on every node."""
    words = [settings.launch_args]
    if settings.processes is not None:
        words.insert(0, f"--num_processes {settings.nodes * settings.processes}")
    if settings.nodes > 1:
        words.insert(0, f"--num_machines {settings.nodes}")
    return " ".join(word for word in words if word)


def _environment() -> jinja2.Environment:
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    made.filters["quote"] = shlex.quote
    return made


def _directive(option: str) -> str:
    """Write an option as sbatch reads it in a script; values were checked for quotes before."""
    return option if PLAIN.fullmatch(option) else f'"{option}"'


def _check_path(run: Path) -> None:
    text = str(run)
    if not text.isprintable() or any(sign in text for sign in "\"'\\"):
        raise UserError(
            f"--run: {text!r}: Slurm cannot write logs to a path with quotes, backslashes or line "
            "breaks; give another."
        )
