"""Steps over several processes, honest and with the faults of parallel runs."""

import numpy as np

from dumps import bounds
from kernel import F32, Trainer, bf16


class VocabParallel(Trainer):
    """Each process holds an equal part of K's rows."""

    processes = 2

    def shards(self):
        for rows in bounds(len(self.k), self.processes):
            yield rows, self.make(self.k[rows], self.loss, rows.start, len(self.k))

    def forward(self, m):
        return self.kernel.merged([kernel.partial(m["hidden"], m["targets"]) for _, kernel in self.shards()])

    def shard_lse(self, kernel, m, lse):
        return lse

    def summed_dq(self, parts):
        return sum(parts)

    def gradients(self, m, g, lse):
        parts, dk = [], np.zeros_like(self.k)
        for rows, kernel in self.shards():
            dq, dk[rows] = kernel.backward(m["hidden"], m["targets"], g, self.shard_lse(kernel, m, lse))
            parts.append(dq)
        return self.summed_dq(parts), dk


def one_shards_dq(shards, shard):
    """dQ as one process has it before the all-reduce, which never comes."""

    class OneShard(VocabParallel):
        processes = shards

        def summed_dq(self, parts):
            return parts[shard]

    return OneShard


def local_lse(shards):
    class Local(VocabParallel):
        processes = shards

        def shard_lse(self, kernel, m, lse):
            return kernel.forward(m["hidden"], m["targets"])[0]

    return Local


def label_per_shard(shards, dk_too, dq_too=True):
    """Every process adds the label's gradient, taken from an all-gathered K, before the sum over processes."""

    class PerShard(VocabParallel):
        processes = shards

        def gradients(self, m, g, lse):
            dq, dk = super().gradients(m, g, lse)
            here, rows, factor = self.kernel.label_factor(m["hidden"], m["targets"], g)
            if dq_too:
                dq[here] += F32(shards - 1) * factor[:, None] * self.k[rows]
            if dk_too:
                np.add.at(dk, rows, F32(shards - 1) * factor[:, None] * m["hidden"][here])
            return dq, dk

    return PerShard


class DataParallel(Trainer):
    """Each process holds an equal part of every microbatch's tokens; denominators are summed over processes."""

    processes = 2

    def parts_of_dk(self, m, g, lse):
        out = []
        for rows in bounds(len(g), self.processes):
            out.append(self.backward_kernel.backward(m["hidden"][rows], m["targets"][rows], g[rows], lse[rows]))
        return np.concatenate([dq for dq, _ in out]), [dk for _, dk in out]

    def reduced(self, parts):
        return sum(parts)

    def gradients(self, m, g, lse):
        dq, parts = self.parts_of_dk(m, g, lse)
        return dq, self.reduced(parts)


def one_processes_dk(shards, shard):
    class OneProcess(DataParallel):
        processes = shards

        def reduced(self, parts):
            return parts[shard]

    return OneProcess


def dk_reduced_in_bf16(shards):
    """The all-reduce of dK adds in bfloat16, process after process."""

    class Reduced(DataParallel):
        processes = shards

        def reduced(self, parts):
            total = bf16(parts[0])
            for part in parts[1:]:
                total = bf16(total + bf16(part))
            return total

    return Reduced
