"""The writer for arrays of numpy and of others."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, folders, merged, same

from fused_xent import CaptureError, Writer

HIDDEN = (np.arange(24, dtype=np.float32) / 8 - 1).reshape(2, 3, 4).astype(ml_dtypes.bfloat16)
TARGETS = np.array([[0, 4, -100], [2, 1, 3]], np.int32)
UNEMBEDDING = (np.arange(20, dtype=np.float32) / 4 - 2).reshape(5, 4).astype(ml_dtypes.bfloat16)


class OnlyDlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_arrays_come_back_bit_for_bit(tmp_path):
    with Writer(tmp_path, loss={"reduction": "sum"}, verify=True) as writer:
        writer.tensor(7, 0, "hidden", HIDDEN)
        writer.tensor(7, 0, "targets", TARGETS)
        weights = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6)[:, ::2]
        writer.tensor(7, 0, "token_weights", weights)
        writer.tensor(7, 0, "lse", OnlyDlpack(np.ones((2, 3), np.float32)))
        writer.tensor(7, 0, "loss", np.ones((2, 3), ">f4"))
        writer.tensor(7, 0, "d_hidden", HIDDEN.astype(np.float64))
        writer.commit(7, 0)
        writer.tensor(7, None, "unembedding", UNEMBEDDING.T, layout="dv")
        writer.commit(7, None)
    same(merged(tmp_path, 7, "mb_0000", "hidden"), HIDDEN)
    same(merged(tmp_path, 7, "mb_0000", "targets"), TARGETS)
    same(merged(tmp_path, 7, "mb_0000", "token_weights"), weights)
    same(merged(tmp_path, 7, "mb_0000", "lse"), np.ones((2, 3), np.float32))
    same(merged(tmp_path, 7, "mb_0000", "loss"), np.ones((2, 3), np.float32))
    same(merged(tmp_path, 7, "mb_0000", "d_hidden"), HIDDEN.astype(np.float64))
    same(merged(tmp_path, 7, "shared", "unembedding"), np.ascontiguousarray(UNEMBEDDING.T))
    [(_, manifest)] = folders(tmp_path, 7)["mb_0000"]
    assert manifest["loss"]["reduction"] == "sum" and manifest["run_id"]


def test_an_array_may_be_overwritten_once_it_is_handed_over(tmp_path):
    with Writer(tmp_path) as writer:
        hidden = np.ones((64, 4096), np.float32)
        writer.tensor(0, 0, "hidden", hidden)
        hidden[:] = 2
        writer.commit(0, 0)
    same(merged(tmp_path, 0, "mb_0000", "hidden"), np.ones((64, 4096), np.float32))


def test_shards_of_two_processes_make_one_tensor(tmp_path):
    for process in range(2):
        with Writer(tmp_path, process_index=process, process_count=2, run_id="job-1") as writer:
            writer.tensor(0, 0, "hidden", HIDDEN[process : process + 1], start=[process, 0, 0], global_shape=HIDDEN.shape)
            writer.commit(0, 0)
    same(merged(tmp_path, 0, "mb_0000", "hidden"), HIDDEN)


def test_errors_say_what_and_leave_the_folder_uncommitted(tmp_path):
    for settings, found in [
        ({"loss": {"reduktion": "sum"}}, "reduction"),
        ({"process_count": 2}, "run_id"),
        ({"contract": {"logits": "fp8"}}, "contract"),
    ]:
        with pytest.raises(ValueError, match=found):
            Writer(tmp_path, **settings)
    writer = Writer(tmp_path)
    with pytest.raises(ValueError, match="bool"):
        writer.tensor(0, 0, "targets", np.ones(3, bool))
    with pytest.raises(ValueError, match="go together"):
        writer.tensor(0, 0, "targets", TARGETS, start=[0, 0])
    writer.tensor(0, 0, "hiden", HIDDEN)
    writer.commit(0, 0)
    with pytest.raises(CaptureError, match="hidden"):
        writer.flush()
    assert folders(tmp_path, 0) == {}
    writer.close()


def test_the_same_array_again_is_ignored_and_another_is_not(tmp_path):
    writer = Writer(tmp_path, num_microbatches=2)
    for m, second in enumerate([HIDDEN, -HIDDEN]):
        writer.tensor(0, m, "hidden", HIDDEN)
        writer.tensor(0, m, "hidden", second)
        writer.commit(0, m)
    with pytest.raises(CaptureError, match="microbatch 1: hidden .* arrived twice"):
        writer.flush()
    assert list(folders(tmp_path, 0)) == ["mb_0000"]


def test_a_step_is_not_written_over(tmp_path):
    for attempt in range(2):
        writer = Writer(tmp_path)
        writer.tensor(0, 0, "hidden", HIDDEN)
        writer.commit(0, 0)
        if attempt:
            with pytest.raises(CaptureError, match="committed already"):
                writer.close()
        else:
            writer.close()


def test_the_example_is_found_healthy(tmp_path):
    example = ROOT / "examples/numpy/capture_step.py"
    subprocess.run([sys.executable, example, tmp_path / "dump"], check=True, timeout=120)
    judged = subprocess.run([os.environ["XENT_DIFF"], tmp_path / "dump"], capture_output=True, text=True, timeout=120)
    assert judged.returncode == 0, judged.stdout
