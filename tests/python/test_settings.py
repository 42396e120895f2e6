"""Options of the example's trainer, none of which is passed over."""

import subprocess
import sys

import pytest
import train_lm
from conftest import ROOT

PAUSE = ("--steps", "7", "--generate-dir", "text")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        train_lm.arguments(list(map(str, arguments)))
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.split(": error: ")[1].strip()


@pytest.mark.parametrize(
    "text, why",
    [
        ("generate_at_step = [2]", "unknown key generate_at_step; did you mean generate_at_steps?"),
        ("generate-every = 2", "unknown key generate-every; did you mean generate_every?"),
        ("zebra = 2", "unknown key zebra; known are capture_at, "),
        ("config = 'other.toml'", "unknown key config; known are "),
        ("[generation]\nprompts = 2", "unknown key generation; "),
        ("steps = 'seven'", "argument --steps: invalid int value: 'seven'"),
        ("steps = [7]", "steps is [7]; expected a number or a string"),
        ("steps = true", "steps is True; expected a number or a string"),
        ("generate_at_steps = 2", "generate_at_steps is 2; expected an array"),
        ("fused = 1", "fused is 1; expected true or false"),
        ("steps =", "Invalid value"),
        ("fused = true\nfault = 'gq-bf16'", "argument --fault: not allowed with argument --fused"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_of_it(tmp_path, capsys, text, why):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert refused(capsys, "--config", file).startswith(f"{file}: {why}")


@pytest.mark.parametrize(
    "arguments, why",
    [
        (["--generate-at-step", "2"], "unknown option --generate-at-step; did you mean --generate-at-steps?"),
        (["--capture_at=2"], "unknown option --capture_at; did you mean --capture-at?"),
        (["7"], "unexpected argument '7'"),
        (["--config", "nowhere.toml"], "nowhere.toml: "),
        ([*PAUSE, "--generate-at-steps", "2", "8"], "generate_at_steps: 8 is not among the 7 steps; expected 1 to 7"),
        ([*PAUSE, "--generate-at-steps", "0"], "generate_at_steps: 0 is not among"),
        ([*PAUSE, "--generate-at-steps", "3", "2"], "generate_at_steps: [3, 2]; expected each step once, in order"),
        ([*PAUSE, "--generate-at-steps", "2", "2"], "generate_at_steps: [2, 2]; expected each step once"),
        ([*PAUSE, "--generate-every", "0"], "generate_every: 0, of 7 steps; expected 1 to 7"),
        ([*PAUSE, "--generate-every", "8"], "generate_every: 8, of 7 steps; expected 1 to 7"),
        ([*PAUSE], "generate_dir goes together with"),
        (["--generate-every", "2"], "generate_dir goes together with"),
        ([*PAUSE, "--generate-every", "2", "--prompts", "0"], "prompts: 0; expected 1 or more"),
        ([*PAUSE, "--generate-every", "2", "--new-tokens", "17"], "new_tokens: 17; expected 1 to 16"),
        ([*PAUSE, "--generate-every", "2", "--generate-timeout", "nan"], "generate_timeout: nan; expected seconds"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(capsys, arguments, why):
    assert refused(capsys, *arguments).startswith(why)


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('steps = 9\ngenerate_at_steps = [2, 4]\ngenerate_dir = "text"\nfused = true\nprompts = 16\n')
    options = train_lm.arguments(["--config", str(file), "--steps", "5", "--generate-at-steps", "3"])
    assert (options.steps, options.generate_at_steps, options.prompts, options.fused) == (5, [3], 16, True)
    assert train_lm.arguments([]).generate_at_steps == []


def test_processes_refuse_before_they_meet(tmp_path):
    """One error for all of them, and their exit code; a process that had begun to join would wait for the others."""
    file = tmp_path / "run.toml"
    file.write_text("promts = 2")
    launcher = [sys.executable, str(ROOT / "examples/jax/launch.py"), "--processes", "2", "--devices", "1", "--timeout", "60"]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples/jax/train_lm.py"), "--config", str(file)], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2 and "Gloo" not in done.stderr
    assert done.stderr.count("error") == 1 and "unknown key promts; did you mean prompts?" in done.stderr
