"""The story of docs/walkthrough.md, small: the runs look in their logs as it says, and their causes are those that it names."""

import json
import re

import pytest
from conftest import ROOT
from test_processes import findings, judged, run, xent_diff
from walkthrough import RUNS

HEALTHY = ("unfused", "fixed")
FAULTS = [name for name in RUNS if name not in HEALTHY]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The folder with the dumps, and what each run showed at each captured step: loss and norm of dK."""
    folder = tmp_path_factory.mktemp("walkthrough")
    said = run("walk", folder, 4, 1)
    assert all(other == said[0] for other in said)
    return folder, said[0]


def test_the_document_names_the_runs():
    text = (ROOT / "docs/walkthrough.md").read_text()
    assert re.findall(r"^  1\. ([\w-]+) · certain$", text, re.M) == FAULTS


def test_the_log_shows_the_gradient_norm_alone(story):
    _, shown = story
    loss, norm = shown["unfused"][0]
    for name in RUNS:
        assert abs(shown[name][0][0] / loss - 1) < 1e-6, "the forward is right in every run"
    assert abs(shown["fixed"][0][1] / norm - 1) < 1e-6
    assert abs(shown["label-scatter-bf16"][0][1] / norm - 1) > 1e-5


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_agrees(story, name):
    assert judged(story[0] / name) == (0, [])


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_named(story, name):
    assert judged(story[0] / name) == (1, [name])


def test_how_the_processes_are_added_is_told(story):
    """At this size XLA lets each process scatter its own tokens."""
    _, report = xent_diff(story[0] / "label-scatter-bf16", "--candidate", "recorded", "--json", "-")
    parameters = [finding["parameters"] for finding in findings(json.loads(report))]
    assert parameters and all(p.get("processes") == 4 for p in parameters)
    assert all(p["processes_added_in"] == "f32-then-bf16" for p in parameters)
