"""Capture of real training in several processes, with things that go wrong in some of them."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, folders, merged
from launch import launch

SCENARIOS = ROOT / "tests/python/scenarios.py"
TOPOLOGIES = [(1, 4), (2, 2), (4, 1)]
os.environ["PYTHONPATH"] = str(ROOT / "examples/jax")


def run(scenario, folder, processes, devices, timeout=240):
    """What each process said. None may fail, none may hang."""
    log = folder / "log.txt"
    with log.open("w") as out:
        codes = launch([str(SCENARIOS), scenario, str(folder)], processes, devices, timeout, out=out)
    assert codes == [0] * processes, f"exit codes {codes}\n{log.read_text()[-4000:]}"
    return [json.loads((folder / f"said-{i}.json").read_text()) for i in range(processes)]


def xent_diff(*arguments):
    """Exit code and standard output."""
    done = subprocess.run([os.environ["XENT_DIFF"], *map(str, arguments)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.mark.parametrize("processes, devices", TOPOLOGIES)
def test_training_is_the_same_bit_for_bit_whatever_is_captured(tmp_path, processes, devices):
    for said in run("paths", tmp_path, processes, devices):
        off = said["off"]
        assert off["collectives"]["all-reduce"] > 0
        assert all(said[path] == off for path in ("record", "callback", "outputs"))
        assert said["fused record"] == said["fused off"]
    for step in (1, 3):
        for path in ("record", "callback", "outputs"):
            parts = folders(tmp_path / path, step)
            assert sorted(parts) == ["mb_0000", "mb_0001", "shared"]
            assert all(len(found) == processes for found in parts.values())
        # Every path hands over the same bits, each element exactly once.
        for part, names in [
            ("mb_0000", ["hidden", "targets"]),
            ("mb_0001", ["hidden", "targets"]),
            ("shared", ["unembedding", "d_unembedding"]),
        ]:
            for name in names:
                first = merged(tmp_path / "record", step, part, name)
                assert np.asarray(first, np.float64).any()
                for path in ("callback", "outputs"):
                    assert merged(tmp_path / path, step, part, name).tobytes() == first.tobytes()
        for name in ("loss", "lse", "label_logits"):
            assert (
                merged(tmp_path / "outputs", step, "mb_0000", name).tobytes()
                == merged(tmp_path / "record", step, "mb_0000", name).tobytes()
            )
    for path in ("record", "callback", "outputs"):
        assert xent_diff("verify", tmp_path / path)[0] == 0


@pytest.mark.parametrize(
    "scenario, processes, devices, why",
    [("unwritable", 2, 2, "Not a directory"), ("full_disk", 4, 1, "File too large")],
)
def test_what_fails_on_one_process_is_raised_on_all(tmp_path, scenario, why, processes, devices):
    said = run(scenario, tmp_path, processes, devices)
    [message] = {s["raised"]["1"] for s in said}
    assert f"process {processes - 1}: " in message and why in message and "process 0" not in message
    assert all(list(s["raised"]) == ["1"] for s in said), "and training went on"
    dump = tmp_path / "dump"
    assert all(len(found) == processes for found in folders(dump, 3).values()) and len(folders(dump, 3)) == 3
    assert all(len(found) == processes - 1 for found in folders(dump, 1).values())
    merged(dump, 3, "mb_0001", "hidden")


@pytest.mark.parametrize(
    "scenario, key, expected",
    [
        ("unwritable_from_the_start", "begin", "process 1: "),
        ("late", "0", "process 1 did not answer in time"),
        ("unlike", "begin", "its settings are"),
    ],
)
def test_all_processes_come_to_the_same_conclusion(tmp_path, scenario, key, expected):
    said = run(scenario, tmp_path, 2, 1)
    [message] = {json.dumps(s["raised"]) for s in said}
    assert list(said[0]["raised"]) == [key] and expected in message


@pytest.mark.parametrize("processes, devices", [(1, 4), (2, 2)])
def test_a_kill_leaves_every_committed_microbatch_readable(tmp_path, processes, devices):
    program = [sys.executable, str(ROOT / "examples/jax/launch.py"), "--timeout", "240"]
    program += ["--processes", str(processes), "--devices", str(devices), str(SCENARIOS), "endless", str(tmp_path)]
    with (tmp_path / "log.txt").open("w") as out:
        launcher = subprocess.Popen(program, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 200
        while len(list(tmp_path.glob("dump/proc_*/step_*/mb_*/manifest.json"))) < 12 * processes:
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()[-4000:]
            time.sleep(0.01)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    dump = tmp_path / "dump"
    whole = 0
    steps = {int(path.name.removeprefix("step_")) for path in dump.glob("proc_*/step_*")}
    for step in steps:
        for part, found in folders(dump, step).items():
            if part != "shared" and len(found) == processes:
                merged(dump, step, part, "hidden")
                merged(dump, step, part, "d_unembedding")
                whole += 1
    assert whole >= 10
    code, told = xent_diff("info", dump)
    assert code == 0, told


def train(folder, processes, devices, *arguments, timeout=240):
    log = folder / "log.txt"
    program = [str(ROOT / "examples/jax/train_lm.py"), "--dumps", str(folder / "dump"), *arguments]
    with log.open("w") as out:
        codes = launch(program, processes, devices, timeout, out=out)
    assert codes == [0] * processes, f"exit codes {codes}\n{log.read_text()[-4000:]}"
    return folder / "dump"


def judged(dump):
    """Exit code, and the cause that the verdict names."""
    code, text = xent_diff(dump, "--candidate", "recorded", "--json", "-")
    causes = [finding["cause"] for finding in findings(json.loads(text))]
    return code, sorted(set(causes))


def findings(value):
    """Every object with a cause and a confidence, runners-up aside, wherever it stands in a report."""
    if isinstance(value, dict):
        if "cause" in value and "remedy" in value:
            yield value
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from findings(item)


STEPS = ("--steps", "41", "--capture-at", "40")


@pytest.mark.parametrize("processes, devices, loss", [(4, 1, ("--fused",)), (1, 4, ())])
def test_a_healthy_run_agrees(tmp_path, processes, devices, loss):
    """With the example's own loss, and with the kernel, by their own contracts."""
    assert judged(train(tmp_path, processes, devices, *STEPS, *loss)) == (0, [])


@pytest.mark.parametrize("fault", ["label-scatter-bf16", "gq-bf16", "mean-of-means"])
def test_a_faulty_run_is_named(tmp_path, fault):
    assert judged(train(tmp_path, 1, 2, *STEPS, "--fault", fault)) == (1, [fault])
