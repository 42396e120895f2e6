"""Writes the dumps of every case into FOLDER, and FOLDER/cases.json: what the diff must make of each.

    python generate.py FOLDER [NAME-PART]

A second implementation of the fault catalogue, independent of the one in the diff: kernel.py is an honest tiled kernel and
training loop in float32 and bfloat16, and precision.py, indices.py, scale.py and parallel.py get single lines of it wrong.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

import cases
import dumps
import inputs
from kernel import F32


def parts(make, k, loss, microbatches, trainer):
    """The lse parts and label parts of the gradients, of a kernel that has them apart."""

    class LsePart(make):
        def label_factor(self, q, targets, g):
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0, F32)

        def scatter(self, dk, rows, values):
            return dk

    class LabelPart(make):
        narrow = staticmethod(np.zeros_like)

    out = [{} for _ in microbatches]
    for suffix, part in (("lse", LsePart), ("label", LabelPart)):
        for tensors, run in zip(out, trainer(part, k, loss, microbatches).run()[0]):
            tensors |= {f"{name}_{suffix}": run[name] for name in ("d_hidden", "d_unembedding")}
    return out


def same(copies):
    """One array where all processes have the same, else each one's."""
    return copies[0] if all(np.array_equal(copies[0], c) for c in copies) else copies


def build(root, case):
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    loss = case.loss
    k, microbatches = inputs.draw(
        rng, case.tokens, case.hidden, case.vocab, case.regime, case.masked, case.weights, loss.get("ignore_index", -100),
        loss.get("valid_vocab"))
    if case.prepare:
        case.prepare(k, microbatches)
    runs = []
    for trainer in case.trainers:
        trainer = type("", (trainer,), {"output": case.output})
        runs.append(trainer(case.kernel, k, loss, microbatches).run())
    recorded = [{name: same([run[0][i][name] for run in runs]) for name in case.record} for i in range(len(microbatches))]
    if case.parts:
        for tensors, more in zip(recorded, parts(case.kernel, k, loss, microbatches, case.trainers[0])):
            tensors |= more
    shared = {"unembedding": k.astype(case.stored)}
    if case.accumulated:
        shared["d_unembedding"] = same([run[1] for run in runs])
    for m, tensors in zip(microbatches, recorded):
        tensors |= {**m, "hidden": m["hidden"].astype(case.stored)}
    dumps.write(root / case.name, loss, recorded, shared, case.processes, case.split, case.layout, case.batch, case.contract)


def main(root, wanted=""):
    root.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in cases.CASES if wanted in case.name]
    for case in chosen:
        build(root, case)
    table = [{"name": c.name, "causes": c.causes, "parameters": c.parameters, "alike": c.alike} for c in chosen]
    (root / "cases.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
