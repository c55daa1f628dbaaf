"""The site file: checked like a recipe, all problems at once."""

from __future__ import annotations

import pytest
import yaml

from xlstm_distill.errors import UserError
from xlstm_distill.jobs.processes import process_count
from xlstm_distill.jobs.site import Site, load_site, seconds_of, site_to_yaml


def write(folder, text):
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def problems(folder, text):
    with pytest.raises(UserError) as caught:
        load_site(write(folder, text))
    return [line.removeprefix(f"{folder / 'site.yaml'}: ") for line in caught.value.problems]


def test_the_example_is_valid_and_an_empty_mapping_too(root, tmp_path):
    site = load_site(root / "slurm" / "site.example.yaml")
    assert site.settings("distill").nodes == 2
    assert site.settings("align").partition == "gpu"
    assert process_count(site.settings("distill")) == 16
    assert load_site(write(tmp_path, "{}\n")) == Site()
    # What a stage does not run in several processes takes no launcher from the defaults.
    assert site.settings("merge").launch is site.settings("report").launch is None
    assert site.settings("prepare").gres is None
    assert site.settings("prepare").extra == ()


def test_what_is_written_is_read_back_equal(root, tmp_path):
    site = load_site(root / "slurm" / "site.example.yaml")
    assert load_site(write(tmp_path, site_to_yaml(site))) == site


def test_all_problems_are_listed_at_once(tmp_path):
    text = """
defaults: {time: 4:00:00, acount: x, extra: ['-p gpu', '--array=1', '--mem=3G', '--x', '--x']}
stages:
  merge: {nodes: 2}
  distil: {}
  prepare: {tasks: 0}
  align: {tasks: 2, nodes: 2}
environment: {A-B: x, C: 1}
launcher: 3
"""
    found = "\n".join(problems(tmp_path, text))
    for words in (
        "launcher: unknown key.",
        "defaults.acount: unknown key. Did you mean 'account'?",
        "defaults.time: 14400 is a number (YAML reads 4:00:00 as one); put the time in quotes.",
        "defaults.extra[0]: '-p gpu' must be a long option of sbatch",
        "defaults.extra[1]: '--array' is given by the script itself",
        "defaults.extra[2]: '--mem' has a key of its own",
        "stages.distil: 'distil' is not allowed.",
        "stages.prepare.tasks: 0 must be at least 1.",
        "environment.A-B: 'A-B' cannot name a variable",
        "environment.C: 1 is a whole number; give text.",
    ):
        assert words in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {report: {nodes: 2}}", "stages.report.nodes: report runs in one process"),
        ("stages: {align: {tasks: 2}}", "stages.align.tasks: it is for stages prepare and capture"),
        ("defaults: {tasks: 2}", "defaults.tasks: it is for stages prepare and capture"),
        ("stages: {align: {nodes: 2}}", "stages.align.launch: missing: 2 nodes need it"),
        (
            "stages: {align: {nodes: 2, launch: ddp}}",
            "stages.align.processes: missing: several nodes",
        ),
        ("stages: {align: {processes: 2}}", "stages.align.launch: missing"),
        ("stages: {align: {launch: nothing}}", "stages.align.launch: 'nothing' is no file"),
        ("stages: {align: {time: '5'}}", "signal_seconds: 300 must be below the time limit of al"),
        ("stages: {align: {time: tomorrow}}", "stages.align.time: 'tomorrow' is no time limit"),
        ('defaults: {account: "a\'b"}', "must be one line without quotes"),
        ("defaults: {extra: ['--x=1', '--x=2']}", "defaults.extra: --x is given twice"),
        ("venv: nowhere", "venv: 'nowhere' is no virtual environment"),
        ("program: []", "program: empty. Give at least one."),
        ("[]", "contains a list; a site file is a mapping"),
    ],
)
def test_a_problem_names_its_key_and_the_fix(text, words, tmp_path):
    assert any(words in line for line in problems(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file; give the path of a site file"):
        load_site(tmp_path / "nothing.yaml")


def test_paths_are_relative_to_the_site_file(tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    (tmp_path / "mine.yaml").write_text("num_processes: 3\n")
    site = load_site(write(tmp_path, "{venv: venv, stages: {align: {launch: mine.yaml}}}"))
    assert site.venv == str(tmp_path / "venv")
    assert process_count(site.settings("align")) == 3
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"num_machines": 1}))
    with pytest.raises(UserError, match=r"mine.yaml: no launch configuration with a number"):
        process_count(site.settings("align"))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("30:10", 1810),
        ("12:00:01", 43201),
        ("2-12", 216000),
        ("2-12:30", 217800),
        ("1-00:00:05", 86405),
        ("1:2:3:4", None),
        ("", None),
    ],
)
def test_times_are_read_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds
