"""Training that pauses to generate: without a trace where all is well, with one error on all processes where it is not."""

import copy
import json
import os
import signal

import pytest
from conftest import ROOT, folders, merged
from generation import check
from launch import launch

PAUSES = ROOT / "tests/python/pauses.py"
TOPOLOGIES = [(1, 4), (2, 2), (4, 1)]
PROMPTS, TOKENS, V = 128, 3, 64
os.environ["PYTHONPATH"] = str(ROOT / "examples/jax")


def run(scenario, folder, processes, devices, timeout=120):
    """Exit codes, and what each process said, `None` for one that said nothing; none may hang."""
    log = folder / "log.txt"
    with log.open("w") as out:
        codes = launch([str(PAUSES), scenario, str(folder)], processes, devices, timeout, out=out, grace=60)
    assert None not in codes, f"exit codes {codes}\n{log.read_text()[-4000:]}"
    files = [folder / f"said-{i}.json" for i in range(processes)]
    return codes, [json.loads(file.read_text()) if file.exists() else None for file in files], log.read_text()


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of `pauses.py bits` on each topology: its folder, what each process said, the log."""
    made = {}
    for processes, devices in TOPOLOGIES:
        folder = tmp_path_factory.mktemp(f"{processes}x{devices}")
        codes, said, log = run("bits", folder, processes, devices, timeout=240)
        assert codes == [0] * processes, f"exit codes {codes}\n{log[-4000:]}"
        made[processes, devices] = folder, said, log
    return made


@pytest.mark.parametrize("processes, devices", TOPOLOGIES)
def test_a_pause_leaves_no_trace(runs, processes, devices):
    """In the parameters, bit for bit, with and without capture; and capture takes what it would."""
    folder, said, _ = runs[processes, devices]
    for one in said:
        assert one["paused"] == one["captured"] == one["plain"]
    for step in (1, 2):
        parts = folders(folder / "dump", step)
        assert sorted(parts) == ["mb_0000", "mb_0001", "shared"]
        assert all(len(found) == processes for found in parts.values())
        merged(folder / "dump", step, "mb_0001", "hidden")
    assert rows_of(folder / "captured/step_00000002/all.jsonl") == rows_of(folder / "paused/step_00000002/all.jsonl")


@pytest.mark.parametrize("processes, devices", TOPOLOGIES)
def test_every_prompt_is_there_once_and_told_when_all_are(runs, processes, devices):
    folder, said, log = runs[processes, devices]
    step = folder / "paused/step_00000002"
    parts = [step / f"part-{p}-of-{processes}.jsonl" for p in range(processes)]
    assert sorted(step.iterdir()) == sorted([step / "all.jsonl", *parts]), "and nothing half written"
    rows = rows_of(step / "all.jsonl")
    assert [row["prompt"] for row in rows] == list(range(PROMPTS))
    for p, part in enumerate(parts):
        assert rows_of(part) == rows[p::processes]
    assert all(row["step"] == 2 and row["process"] == row["prompt"] % processes for row in rows)
    assert all(len(row["tokens"]) == TOKENS and all(0 <= t < V for t in row["tokens"]) for row in rows)
    assert len({tuple(row["tokens"]) for row in rows}) > 4
    assert all(one["totals"] == [PROMPTS, PROMPTS * TOKENS] for one in said)
    assert log.count(f"generated step 2: {PROMPTS} prompts, {PROMPTS * TOKENS} tokens, {step / 'all.jsonl'}") == 1


def test_what_is_generated_does_not_depend_on_the_shares(runs):
    def of(folder):
        rows = rows_of(folder / "untrained/step_00000000/all.jsonl")
        return [{key: value for key, value in row.items() if key != "process"} for row in rows]

    first, *others = [of(folder) for folder, _, _ in runs.values()]
    assert all(other == first for other in others)


def test_only_the_gather_is_a_collective(runs):
    for _, said, _ in runs.values():
        for one in said:
            assert sum(one["gather"].values()) > 0
            assert sum(one["generate"].values()) == 0


@pytest.mark.parametrize(
    "scenario, processes, devices, codes, expected",
    [
        ("failing", 2, 2, [1, 1], "process 1: FloatingPointError: no text for prompt 3"),
        ("late", 2, 1, [1, 1], "process 1 did not answer in time"),
        ("first_late", 2, 1, [1, 1], "process 0 did not conclude within 2 s of process 1"),
        ("killed", 4, 1, [1, 1, 1, -signal.SIGKILL], "process 3 did not answer in time"),
        ("killed_before", 2, 1, [1, -signal.SIGKILL], "process 1 did not answer in time"),
    ],
)
def test_all_processes_end_with_the_same_error(tmp_path, scenario, processes, devices, codes, expected):
    found, said, log = run(scenario, tmp_path, processes, devices)
    assert found == codes, log[-4000:]
    told = [one for one, code in zip(said, codes) if code == 1]
    assert told == [["GenerationError", f"generation after 1 steps:\n{expected}"]] * len(told), log[-4000:]
    assert not list(tmp_path.glob("text/*/all.jsonl")) and "generated step" not in log


def test_no_process_outlives_the_first(tmp_path):
    """It keeps what the others would agree through: JAX ends them."""
    codes, _, log = run("first_killed", tmp_path, 2, 1)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert not list(tmp_path.glob("text/*/all.jsonl")) and "generated step" not in log


def test_an_error_of_capture_ends_all_processes_alike_too(tmp_path):
    codes, said, log = run("blocked", tmp_path, 2, 1)
    assert codes == [1, 1], log[-4000:]
    assert said[0] == said[1] and said[0][0] == "CaptureError" and "process 1: " in said[0][1]


WHOLE = [{"rows": [{"prompt": i, "tokens": [i, 0, V - 1]} for i in range(p, 10, 3)], "error": None} for p in range(3)]


def test_shares_are_checked():
    assert check(WHOLE, 10, TOKENS, V) == []

    def wrong(spoil):
        heard = copy.deepcopy(WHOLE)
        spoil(heard)
        return check(heard, 10, TOKENS, V)

    def rows(heard, p):
        return heard[p]["rows"]

    assert wrong(lambda h: rows(h, 1).pop(1)) == ["process 1: prompt 4: it is missing"]
    assert wrong(lambda h: rows(h, 1).append(rows(h, 1)[0])) == ["process 1: prompt 1: it is there twice"]
    assert wrong(lambda h: rows(h, 1).append(rows(h, 2)[0])) == ["process 1: prompt 2: it is of process 2's share"]
    beyond = {"prompt": 10, "tokens": [0] * TOKENS}
    assert wrong(lambda h: rows(h, 0).append(beyond)) == ["process 0: prompt 10: there are prompts 0 to 9"]
    assert wrong(lambda h: rows(h, 2)[0]["tokens"].pop()) == ["process 2: prompt 2: 2 tokens; expected 3"]
    for token in (V, -1):
        told = wrong(lambda h: rows(h, 0)[1].update(tokens=[0, token, 0]))
        assert told == [f"process 0: prompt 3: token {token}; expected 0 to {V - 1}"]
    assert wrong(lambda h: h.__setitem__(2, None)) == ["process 2 did not answer in time"]
    assert wrong(lambda h: h[0].update(rows=[], error="OSError: full")) == ["process 0: OSError: full"]
    none = [{"rows": [], "error": None}]
    assert check(none, 10, TOKENS, V)[-1] == "process 0: and 2 more"
