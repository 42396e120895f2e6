"""The table of peers: `table.py XENT_DIFF DUMPS [NAME...]`, as Markdown."""

import json
import os
import subprocess
import sys
import tempfile

from peer import PEERS

HERE = os.path.dirname(os.path.abspath(__file__))


def judged(xent_diff, dump, candidate):
    """A cell: the verdict, dQ's and dK's worst ratios to the floor, and the causes."""
    ended = subprocess.run([xent_diff, dump, "--json", "-", "--candidate", candidate], capture_output=True, text=True)
    if ended.returncode > 1:
        print(f"{candidate}: {ended.stderr.strip()}", file=sys.stderr)
        return "not run"
    report = json.loads(ended.stdout)["candidates"][0]
    tensors = [tensor for microbatch in report["microbatches"] for tensor in microbatch["tensors"]]
    worst = lambda name: max(tensor["ratio"] for tensor in tensors if tensor["name"] == name)
    contract = report["contract"]
    cell = f"{report['verdict']} {worst('d_hidden'):.3g}×, {worst('d_unembedding'):.3g}× (dlogits {contract['dlogits']})"
    causes = [f"{f['cause']} ({f['confidence']}, {f['explained']:.0%})" for f in report["findings"]]
    return "; ".join([cell, *causes])


def main(xent_diff, dumps, *names):
    names = names or PEERS
    cases = ["initial", "trained", "ragged"]
    print("| peer |" + "".join(f" {case} |" for case in cases) + "\n|---|" + "---|" * len(cases))
    for name in names:
        command = f"cmd:'{sys.executable}' '{HERE}/peer.py' {name}"
        print(f"| {name} |" + "".join(f" {judged(xent_diff, f'{dumps}/{case}', command)} |" for case in cases), flush=True)
    for name in (name for name in names if hasattr(PEERS[name], "loss_of")):
        print(f"| {name}, as `stablehlo:` |", end="")
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                file, dump = f"{folder}/{name}.mlir", f"{dumps}/{case}"
                subprocess.run([sys.executable, f"{HERE}/peer.py", "--export", name, dump, file], check=True)
                print(f" {judged(xent_diff, dump, f'stablehlo:{file}')} |", end="", flush=True)
        print()


main(*sys.argv[1:])
