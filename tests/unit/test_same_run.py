"""Two runs are the same where hashes and figures are, whatever the clock said."""

import json
from pathlib import Path
from typing import Any

from tools.same_run import differences


def run(root: Path, md5: str = "1", **metrics: Any) -> Path:
    (root / "metrics").mkdir(parents=True)
    outs = f"[{{path: artifacts/masks, md5: '{md5}'}}, {{path: artifacts/profile, md5: '{root.name}'}}]"
    (root / "dvc.lock").write_text(f"stages: {{learn_masks: {{outs: {outs}}}}}\n")
    (root / "metrics" / "masks.json").write_text(json.dumps(metrics))
    (root / "metrics" / "speed.json").write_text(json.dumps({"prefill": root.name}))
    return root


def test_time_memory_and_speed_do_not_count(tmp_path: Path) -> None:
    one = run(tmp_path / "a", loss=1.0, seconds=2.0, peak_memory_bytes=3, recovered={"share_per_minute": 1})
    other = run(tmp_path / "b", loss=1.0, seconds=5.0, peak_memory_bytes=9, recovered={"share_per_minute": 2})
    assert differences(one, other) == []


def test_a_hash_a_figure_and_an_absent_key_count(tmp_path: Path) -> None:
    one = run(tmp_path / "a", "1", loss={"first": 1.0}, steps=2)
    other = run(tmp_path / "b", "2", loss={"first": 1.5})
    assert differences(one, other) == [
        "artifacts/masks: 1 and 2",
        "metrics/masks.json:loss.first: 1.0 and 1.5",
        "metrics/masks.json:steps: 2 and absent",
    ]
