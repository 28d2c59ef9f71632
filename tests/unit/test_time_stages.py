"""Timing the stages: their order, the memory of a process, the disk, and the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.time_stages import MEASURED, PIPELINE, disk_bytes, ordered, table
from tvaprune.params.loading import read_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = {
    "machine": {"processor": "Some CPU", "threads": 2, "dtype": "bfloat16", "torch": "2"},
    "stages": {
        "one": {"seconds": 90, "host_memory_bytes": 1_000_000_000},
        "two": {"seconds": 30, "host_memory_bytes": 2_000_000_000},
    },
    "disk_bytes": {"packages": 3_000_000_000, "run": 1_500_000_000},
}


def test_a_stage_comes_after_those_whose_outputs_it_reads():
    stages = {
        "last": {"deps": ["made/one/file", "made/two"]},
        "second": {"deps": ["made/one"], "metrics": [{"made/two": {"cache": False}}]},
        "first": {"deps": ["elsewhere"], "outs": ["made/one"]},
    }
    assert ordered(stages) == ["first", "second", "last"]


def test_every_stage_of_the_pipeline_is_timed_once():
    stages = read_yaml(PIPELINE)["stages"]
    assert sorted(ordered(stages)) == sorted(stages)
    assert list(json.loads(MEASURED.read_text())["stages"]) == ordered(stages)


@pytest.mark.parametrize("status", [0, 3])
def test_memory_is_that_of_the_largest_process_and_the_status_its_own(tmp_path: Path, status: int):
    inner = f"import sys; held = bytearray(300_000_000); held[::4096] = b'1' * len(held[::4096]); sys.exit({status})"
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {inner!r}]))"
    # In a process of its own, which is small.
    measuring = (
        "import json, sys; from pathlib import Path; from tools.measured_process import run_measured; "
        f"print(json.dumps(run_measured([sys.executable, '-c', {outer!r}], Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", measuring], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found, figures = json.loads(done.stdout)
    assert found == status
    assert 300_000_000 < figures["host_memory_bytes"] < 600_000_000
    assert figures["seconds"] > 0


def test_a_file_with_two_names_counts_once_on_disk(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"1" * 1_000_000)
    once = disk_bytes([tmp_path])
    (tmp_path / "same").hardlink_to(tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert 1_000_000 <= once <= disk_bytes([tmp_path]) < 1_100_000


def test_the_table_has_the_sum_of_the_times_and_the_largest_memory():
    lines = table(FIGURES).splitlines()
    assert "| one | 1.5 | 1.0 |" in lines
    assert "| all | 2.0 | 2.0 |" in lines
    assert "packages take 3.0 GB and what the run leaves 1.5 GB" in lines[-1]
