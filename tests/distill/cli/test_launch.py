"""`--launch`: shipped configurations, arguments for the right parser, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from xlstm_distill.cli.processes.launch import LauncherResult, own_arguments, parse_launcher, start
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import Layout, asked_layout
from xlstm_distill.runtime.signals import EXIT_CODE

CONFIGS = Path(__file__).parents[3] / "recipes" / "accelerate"
LAYOUTS = {
    "ddp": Layout("ddp", 8, None, "bf16"),
    "ddp-cpu": Layout("ddp", 2, None, "no"),
    "fsdp2": Layout("fsdp", 8, 2, "bf16"),
    "hsdp": Layout("fsdp", 16, 2, "bf16", replicas=2),
    **{f"zero{stage}": Layout("deepspeed", 8, stage, "bf16") for stage in (1, 2, 3)},
}


def test_every_shipped_configuration_is_known_here():
    assert {path.stem for path in CONFIGS.iterdir()} == set(LAYOUTS)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is removed again
        monkeypatch.delenv(name)


def environment_of(name: str, *words: str) -> dict[str, str]:
    """What accelerate launch would tell the processes."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parsed = parse_launcher(
        CONFIGS / f"{name}.yaml",
        [*words, "-m", "xlstm_distill", "align", "recipe.yaml", "--run", "out"],
    )
    checked, _, _ = _validate_launch_command(parsed)
    assert checked.training_script_args == ["align", "recipe.yaml", "--run", "out"]
    checked.deepspeed_fields_from_accelerate_config = ""
    told = (
        prepare_deepspeed_cmd_env(checked)[1]
        if checked.use_deepspeed
        else prepare_multi_gpu_env(checked)
    )
    return {**told, "RANK": "0", "WORLD_SIZE": str(checked.num_processes)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_shipped_configuration_asks_for_what_it_is_named_after(name):
    assert asked_layout(environment_of(name)) == LAYOUTS[name]
    words = ["--num_processes", "4", "--mixed_precision", "no"]
    if name == "hsdp":
        words += ["--parallelism_config_dp_shard_size", "2"]
    changed = asked_layout(environment_of(name, *words))
    assert (changed.kind, changed.processes, changed.precision) == (LAYOUTS[name].kind, 4, "no")


def test_several_machines_come_from_the_command_line():
    machine = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1"]
    parsed = parse_launcher(
        CONFIGS / "fsdp2.yaml", [*machine, "--main_process_port", "2950", "-m", "xlstm_distill"]
    )
    assert (parsed.num_machines, int(parsed.machine_rank), parsed.main_process_port) == (2, 1, 2950)
    alone = parse_launcher(CONFIGS / "fsdp2.yaml", ["-m", "xlstm_distill"])
    assert alone.main_process_port == 0  # any that is free


def test_the_switch_for_activation_checkpointing_is_read(tmp_path):
    settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    settings["fsdp_config"]["fsdp_activation_checkpointing"] = True
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    assert asked_layout(environment_of(str(tmp_path / "own"))).activation_checkpointing


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ("align r.yaml --launch c.yaml --run d", "align r.yaml --run d"),
        ("align --launch=c.yaml r.yaml --launch-args=--x", "align r.yaml"),
        (
            "distill r.yaml --launch-args --x --launch c.yaml --expert math",
            "distill r.yaml --expert math",
        ),
    ],
)
def test_the_processes_get_the_command_without_the_launcher_s_options(words, kept):
    assert own_arguments(words.split()) == kept.split()


@pytest.mark.parametrize(
    ("codes", "asked", "code"),
    [
        ([], False, 0),
        ([2, -15], False, 2),
        ([1, EXIT_CODE], False, 1),  # the others were stopped because one failed
        ([EXIT_CODE, EXIT_CODE], False, EXIT_CODE),  # a process was asked to stop by itself
        ([1, EXIT_CODE], True, EXIT_CODE),
        ([-10], True, EXIT_CODE),  # the signal came before there was a handler
        ([-9, -15], False, 137),
        ([-9, -9], True, 137),
    ],
)
def test_exit_codes(codes, asked, code):
    ended = LauncherResult()
    ended.codes = codes
    assert ended.exit_code(asked=asked) == code


def test_what_is_no_configuration_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--launch: '.*nowhere.yaml' does not exist"):
        start(tmp_path / "nowhere.yaml", "", ["align"])
    (tmp_path / "odd.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_typ: FSDP\n"
    )
    with pytest.raises(
        UserError,
        match=r"--launch: '.*odd.yaml' is not a configuration of accelerate launch: .*typ",
    ):
        start(tmp_path / "odd.yaml", "", ["align"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(
        UserError, match=r"--launch: '.*list.yaml' is not a configuration of accelerate launch"
    ):
        start(tmp_path / "list.yaml", "", ["align"])
    with pytest.raises(UserError, match=r"--launch-args: .*--num_procs"):
        start(CONFIGS / "ddp.yaml", "--num_procs 4", ["align"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("foo", "'foo' is no option of accelerate launch"),
        ("--num_processes 2 foo", "'foo' is no option of accelerate launch"),
        ("-m foo", "'foo' is no option of accelerate launch"),
        (
            "--num_processes '2",
            '"--num_processes \'2" cannot be read as words of a shell: No closing quotation',
        ),
        ("--help", "it asks for help; 'accelerate launch --help' gives it"),
        ("--num_processes", "expected one argument"),
        ("--num_processes 0", "--num_processes: 0 must be a whole number from 1 on"),
        ("--num_processes -2", "--num_processes: -2 must be a whole number from 1 on"),
    ],
)
def test_words_that_accelerate_cannot_use_are_one_line(words, said, capfd):
    with pytest.raises(UserError) as error:
        start(CONFIGS / "ddp.yaml", words, ["align"])
    assert str(error.value).startswith("--launch-args: ")
    assert said in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1\n", "is not a configuration of accelerate launch: while parsing"),
        (b"\xff\xfe\x00", "is not a configuration of accelerate launch: 'utf-8' codec"),
        (b"", "is not a configuration of accelerate launch"),
        (
            b"distributed_type: MULTI_GPU\nnum_processes: two\n",
            "num_processes: 'two' must be a whole number from 1 on",
        ),
        (b"distributed_type: MULTI_GPU\n", "num_processes: -1 must be a whole number from 1 on"),
        (b"compute_environment: AMAZON_SAGEMAKER\n", "is not a configuration of accelerate launch"),
    ],
)
def test_files_that_are_no_configuration_are_one_line(content, said, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError) as error:
        start(tmp_path / "bad.yaml", "", ["align"])
    assert str(error.value).startswith("--launch: ")
    assert said in str(error.value)


def test_an_error_of_the_launcher_without_words_is_named():
    ended = LauncherResult()
    ended.error = AssertionError()
    with pytest.raises(UserError, match="accelerate launch failed: AssertionError"):
        ended.exit_code(asked=False)


@pytest.mark.parametrize(("words", "processes"), [("", 8), ("--num_processes 3", 3)])
def test_the_number_of_processes_is_looked_at_before_they_start(words, processes):
    def refuse(count):
        raise UserError(f"{count} processes")

    with pytest.raises(UserError, match=f"^{processes} processes$"):
        start(CONFIGS / "ddp.yaml", words, ["align"], refuse)


@pytest.mark.parametrize(
    ("codes", "interrupts", "code"),
    [
        ([130, 130], 1, 130),
        ([130, EXIT_CODE], 1, 130),  # the launcher sent SIGTERM to the one that ended later
        ([-2, -15], 1, 130),  # Ctrl-C came before there was a handler
        ([-9, -9], 2, 130),  # they did not end after the second Ctrl-C
        ([1, -15], 1, 1),  # one had failed by itself
        ([], 1, 0),
        ([], 2, 0),
    ],
)
def test_exit_codes_after_ctrl_c(codes, interrupts, code):
    result = LauncherResult()
    result.codes = codes
    assert result.exit_code(asked=False, interrupts=interrupts) == code
