"""The fused kernel beside its peers on this CPU: time, memory and accuracy. Start it with `run`; see docs/performance.md.

Each contender is a process that holds the inputs and waits. One works at a time, round-robin; what the others take of the
CPU meanwhile is measured too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from contenders import RECIPES

OURS = "fused-xent"
OPERATIONS = {"loss_and_grad": 6, "forward": 2, "recompute": 8}  # times N·D·V
# A contender whose mean loss or gradients are further than this from float64, relatively, is wrong, not imprecise. Seen so far:
# gradients 1 % off for bfloat16 logits, and a loss 1.4 % off, summed over 125 chunks in bfloat16.
TOLERANCE = 0.05
# At float32 level: no further from float64 than rounding to the gradient's own dtype, and this.
SLACK, FLOAT32_LEVEL = 1.02, 1e-5
WRONG = "wrong answer"
MOST_IDLE = 0.03  # of a core
TICKS = os.sysconf("SC_CLK_TCK")


class Failure(Exception):
    """Why a contender cannot take part."""


class Contender:
    def __init__(self, name, command, folder, environment):
        self.name = name
        self.prefix = Path(folder, name.replace("/", "-"))
        self.log = Path(f"{self.prefix}.log")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.version = None
        self.passes = list(OPERATIONS)

    def greet(self):
        hello = self.answer()
        self.version = hello["version"]
        self.passes = hello.get("passes", self.passes)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = (self.log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise Failure(f"signal {-code}; out of memory?" if code < 0 else f"exit status {code}: {last}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def ask(self, command):
        try:
            print(command, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def run(self, command):
        """The answer; where the contender does not count its own allocations, with the resident memory before and at most."""
        pid = self.process.pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the most so far := now
        before = memory(pid, "VmRSS")
        answer = self.ask(command)
        return {"resident_before": before, "resident_most": memory(pid, "VmHWM")} | answer

    def end(self):
        self.process.kill()
        self.process.wait()


def memory(pid, field):
    """In bytes, from the process's status."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(field + ":"))


def cpu_seconds(pid):
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def make_inputs(folder, tokens, hidden, vocab):
    """Like a model that has learned something: logits of standard deviation 4, the label's higher by 16 than by chance."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((vocab, hidden), np.float32) * np.float32(4 / hidden**0.5)
    y = rng.integers(vocab, size=tokens, dtype=np.int32)
    q = rng.standard_normal((tokens, hidden), np.float32) + k[y]
    q, k = (x.astype(ml_dtypes.bfloat16) for x in (q, k))
    for name, x in {"hidden.bf16": q, "unembedding.bf16": k, "targets.i32": y}.items():
        x.tofile(Path(folder, name))
    return q, k, y


class Reference:
    """The mean loss, and samples of the rows of dQ and dK, in float64."""

    def __init__(self, q, k, y):
        tokens, vocab = len(q), len(k)
        rng = np.random.default_rng(1)
        self.tokens = np.unique(rng.integers(tokens, size=64))
        self.ids = np.unique(np.concatenate([rng.choice(y, 64), rng.integers(vocab, size=64)]))
        q, k = q.astype(np.float64), k.astype(np.float64)
        self.loss, self.dk, dq = 0.0, 0.0, []
        for start in range(0, tokens, 256):
            rows = np.arange(start, min(start + 256, tokens))
            z = q[rows] @ k.T
            top = z.max(1)
            lse = top + np.log(np.exp(z - top[:, None]).sum(1))
            self.loss += (lse - z[rows - start, y[rows]]).sum() / tokens
            dlogits = np.exp(z - lse[:, None])
            dlogits[rows - start, y[rows]] -= 1
            dlogits /= tokens
            self.dk = self.dk + dlogits[:, self.ids].T @ q[rows]
            dq.append(dlogits[np.isin(rows, self.tokens)] @ k)
        self.dq = np.concatenate(dq)

    def judge(self, contender, what, answer):
        """Relative errors, and whether each gradient is at float32 level. Takes the gradients' files away."""
        found = {"loss_error": abs(answer["loss"] - self.loss) / self.loss}
        for name, expected, sample in (("dq", self.dq, self.tokens), ("dk", self.dk, self.ids)):
            if name not in answer:
                continue
            file = Path(f"{contender.prefix}.{name}")
            dtype = np.dtype(answer[name])
            rows = np.memmap(file, dtype, "r").reshape(-1, expected.shape[1])[sample].astype(np.float64)
            file.unlink()
            floor = relative(expected.astype(dtype).astype(np.float64), expected)
            error = relative(rows, expected)
            found |= {f"{name}_dtype": dtype.name, f"{name}_error": error, f"{name}_rounding": floor}
            found[f"{name}_float32_level"] = bool(error <= SLACK * floor + FLOAT32_LEVEL)
        errors = {name: found.get(f"{name}_error", 0.0) for name in ("loss", "dq", "dk")}
        wrong = [f"{name} is off by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCE]
        if wrong:
            raise Failure(f"{WRONG} to {what}: {', '.join(wrong)}")
        return found


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def measure(shape, options, folder, environment):
    """The report on one shape: a process for every contender, warmed up and judged, then the rounds."""
    numbers = [str(x) for x in shape]
    q, k, y = make_inputs(folder, *shape)
    reference = Reference(q, k, y)
    del q, k, y
    contenders, failures, results = {}, {}, {}
    peak = {"instructions": "none", "gflops": 0.0}

    def attempt(name, step):
        try:
            step()
        except Failure as failure:
            failures[name] = str(failure)
            print(f"{name}: {failure}", file=sys.stderr)
            contenders.pop(name).end()

    def warm_up(contender):
        contender.greet()
        for what in (p for p in options.passes if p in contender.passes):
            answer = contender.run(f"{what} {contender.prefix}")
            judged = reference.judge(contender, what, answer)
            results[contender.name, what] = {"answers": [], "loss": answer["loss"], **judged}

    def turn(contender):
        nonlocal peak
        for what in (p for p in options.passes if p in contender.passes):
            results[contender.name, what]["answers"].append(contender.run(what))
        if contender.name.startswith(OURS):
            peak = max(peak, contender.ask("peak"), key=lambda p: p["gflops"])

    try:
        for name in options.only:
            if name.startswith(OURS):
                command = [options.worker, folder, *numbers, *name.split("/")[1:]]
            else:
                recipes = str(Path(__file__).with_name("contenders.py"))
                command = [sys.executable, recipes, name, folder, *numbers, str(options.threads)]
            progress(f"{name}: first run")
            contenders[name] = Contender(name, command, folder, environment)
            attempt(name, lambda: warm_up(contenders[name]))
        time.sleep(0.5)  # the threads of this process's BLAS, busy with judging, spin for a while
        idle_share = 0.0
        for number in range(options.rounds):
            for name, contender in list(contenders.items()):
                progress(f"round {number + 1} of {options.rounds}: {name}")
                others = [os.getpid()] + [c.process.pid for c in contenders.values() if c is not contender]
                before, start = sum(map(cpu_seconds, others)), time.monotonic()
                attempt(name, lambda: turn(contender))
                # Over less than a second, a tick of the clock would look like much.
                elapsed = max(time.monotonic() - start, 1.0)
                idle_share = max(idle_share, (sum(map(cpu_seconds, others)) - before) / elapsed)
        versions = {name: contender.version for name, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.end()
        progress("")
    rows = records(shape, {key: result for key, result in results.items() if key[0] in contenders}, peak)
    return {
        "shape": shape,
        "peak": peak,
        "idle_share": idle_share,
        "versions": versions,
        "rows": list(rows),
        "failures": failures,
    }


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def records(shape, results, peak):
    """A flat record for each contender and pass."""
    tokens, hidden, vocab = shape
    median, resting = {}, {}
    for (name, what), result in results.items():
        median[name, what] = statistics.median(answer["seconds"] for answer in result["answers"])
        # Some let go of a pass's memory only in the next; hence the least that was resident before any.
        least = min(answer["resident_before"] for answer in result["answers"])
        resting[name] = min(least, resting.get(name, least))
    for (name, what), result in results.items():
        answers = result.pop("answers")
        most = max(answer["resident_most"] - answer.get("gradient_bytes", 0) for answer in answers)
        gflops = OPERATIONS[what] * tokens * hidden * vocab / median[name, what] / 1e9
        ours = median.get((OURS, what))
        yield {
            "contender": name,
            "pass": what,
            **result,
            "seconds": [answer["seconds"] for answer in answers],
            "median_seconds": median[name, what],
            "extra_bytes": max(answer.get("extra_bytes", most - resting[name]) for answer in answers),
            "gflops": gflops,
            "share_of_peak": gflops / peak["gflops"] if peak["gflops"] else None,
            "times_ours": median[name, what] / ours if ours else None,
        }


def table(rows):
    """In Markdown, aligned."""
    def gradient(row, name):
        dtype = {"bfloat16": "bf16", "float32": "f32"}
        return f"{row[name + '_error']:.1e} ({dtype[row[name + '_dtype']]})" if name + "_error" in row else ""

    columns = {
        "contender": lambda row: row["contender"],
        "pass": lambda row: row["pass"],
        "seconds (min–max)": lambda row: "{:.3g} ({:.3g}–{:.3g})".format(
            row["median_seconds"], min(row["seconds"]), max(row["seconds"])
        ),
        "GFLOP/s": lambda row: f"{row['gflops']:.1f}",
        "of peak": lambda row: f"{row['share_of_peak']:.1%}" if row["share_of_peak"] else "",
        "time / ours": lambda row: f"{row['times_ours']:.2f}" if row["times_ours"] else "",
        "extra MB": lambda row: f"{row['extra_bytes'] / 1e6:.1f}",
        "loss error": lambda row: f"{row['loss_error']:.1e}",
        "dQ error": lambda row: gradient(row, "dq"),
        "dK error": lambda row: gradient(row, "dk"),
        "at float32 level": lambda row: ", ".join(
            shown for shown, name in (("dQ", "dq"), ("dK", "dk")) if row.get(name + "_float32_level")
        ),
    }
    cells = [list(columns)] + [[cell(row) for cell in columns.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def show(report):
    """The last shape of the report."""
    one = report["shapes"][-1]
    peak = one["peak"]
    tokens, hidden, vocab = one["shape"]
    print(f"N = {tokens}, D = {hidden}, V = {vocab}; {report['processor']}; threads: {report['threads']}, rounds: {report['rounds']}")
    print(f"peak: {peak['gflops']:.0f} GFLOP/s ({peak['instructions']})" if peak["gflops"] else "peak: not measured")
    print(f"idle contenders took {one['idle_share']:.1%} of a core at most\n")
    print(table(one["rows"]), end="\n\n")
    for name, version in one["versions"].items():
        print(f"{name}: {version}")
    for name, why in one["failures"].items():
        print(f"{name}: not measured: {why}")
    print(flush=True)
    if one["idle_share"] > MOST_IDLE:
        print("warning: idle contenders were not idle, which disturbs the times above", file=sys.stderr)


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def list_of(known, what):
    def parse(text):
        names = text.split(",")
        unknown = [name for name in names if name not in known and not (what == "contender" and name.startswith(OURS + "/"))]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
        return names

    return parse


def dimensions(text):
    try:
        shape = tuple(map(int, text.split(",")))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected N,D,V, such as 4096,1024,50304")
    return shape


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or above")
    return int(text)


def main():
    names = [OURS, *RECIPES]
    parser = argparse.ArgumentParser(prog="benches/peers/run", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--worker", required=True, help="the built example `peer`; run gives it")
    parser.add_argument("--shape", type=dimensions, action="append", metavar="N,D,V", help="repeatable; 4096,1024,50304")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=positive, help="of every contender; all")
    parser.add_argument("--passes", type=list_of(OPERATIONS, "pass"), default=list(OPERATIONS), help=",".join(OPERATIONS))
    parser.add_argument("--only", type=list_of(names, "contender"), default=names, help=f"{','.join(names)},{OURS}/KERNEL")
    parser.add_argument("--json", type=Path, help="a file for everything measured")
    options = parser.parse_args()
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    processors = sorted(os.sched_getaffinity(0))
    options.threads = options.threads or len(processors)
    if options.threads > len(processors):
        parser.error(f"--threads {options.threads}: this process may use {len(processors)} processors")
    # Inherited; XLA takes the number of its threads from here.
    os.sched_setaffinity(0, processors[: options.threads])
    threads = {name: str(options.threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # No accelerator; no compiler processes that outlive the compilation.
    alone = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    report = {"processor": processor(), "threads": options.threads, "rounds": options.rounds, "shapes": []}
    for shape in options.shape or [(4096, 1024, 50304)]:
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            report["shapes"].append(measure(shape, options, folder, os.environ | threads | alone))
        show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failures = [failure for one in report["shapes"] for failure in one["failures"].items()]
    sys.exit(any(name.startswith(OURS) or why.startswith(WRONG) for name, why in failures))


if __name__ == "__main__":
    main()
