"""Signals at random moments of every stage: `dvc repro` then ends with the hashes of the undisturbed run."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.faults.kills import (
    SIGNALS,
    STAGES,
    TARGETS,
    Kill,
    Killer,
    Undisturbed,
    contents,
    different,
    prepare,
    report,
    run,
)
from tests.faults.warm import warm_programs
from tests.pipeline.workspace import REPOSITORY
from tools.mend_dvc import mend


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVAPRUNE_TEST_SCRATCH", str(root / "scratch"))
        with warm_programs(root / "warm") as warm:
            workspace = prepare(root / "finished", warm.variables())
            yield Killer(Undisturbed(workspace, contents(workspace)), warm, root / "killed")


@pytest.mark.nightly
@pytest.mark.parametrize(("number", "target"), list(zip(SIGNALS, TARGETS, strict=True)))
def test_a_signal_at_a_random_moment_changes_nothing(killer: Killer, number: signal.Signals, target: str) -> None:
    moment = random.Random(target).random()
    assert killer.kill("learn_masks", number, target, moment).different == []  # type: ignore[arg-type]


@pytest.mark.nightly
def test_the_comparison_sees_a_changed_byte(killer: Killer) -> None:
    path = killer.workspace.root / "artifacts" / "masks" / "tensors.safetensors"
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert different(killer.workspace, killer.undisturbed) == ["artifacts/masks/tensors.safetensors"]
    path.write_bytes(right)


@pytest.mark.nightly
@pytest.mark.timeout(6 * 3600)
def test_two_hundred_kills_leave_no_difference(tmp_path: Path) -> None:
    done = run(tmp_path, kills=200)
    assert [kill for kill in done if kill.different] == []
    assert {kill.stage for kill in done if kill.came} == set(STAGES)


@pytest.mark.parametrize(("left", "kept"), [("", False), ('{"read": {', False), ('{"read": {}}', True)])
def test_only_a_list_that_dvc_cannot_read_is_removed(tmp_path: Path, left: str, kept: bool) -> None:
    assert mend(tmp_path) == []
    path = tmp_path / ".dvc" / "tmp" / "rwlock"
    path.parent.mkdir(parents=True)
    path.write_text(left)
    assert mend(tmp_path) == ([] if kept else ["rwlock was cut off: removed"])
    assert path.exists() is kept


def test_of_a_lock_file_that_was_cut_off_the_whole_stages_stay(tmp_path: Path) -> None:
    """Wherever it was cut, DVC can read what is left, and each stage in it is as it was."""
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    path, whole = tmp_path / "dvc.lock", (REPOSITORY / "dvc.lock").read_text()
    stages = YAML(typ="safe").load(whole)["stages"]
    path.write_text(whole)
    assert mend(tmp_path) == []
    assert path.read_text() == whole
    chance = random.Random(0)
    for cut in [0, 5, 25, *(chance.randrange(len(whole)) for _ in range(12))]:
        path.write_text(whole[:cut])
        said = mend(tmp_path)
        left = YAML(typ="safe").load(path)["stages"] if path.exists() else {}
        complete = sum(whole[:cut].count(f"\n  {name}:\n") for name in stages)
        assert complete - 1 <= len(left) <= complete
        assert bool(said) is (not path.exists() or path.read_text() != whole[:cut])
        assert all(stages[name] == entry or entry == list(left.values())[-1] for name, entry in left.items())


def test_the_report_counts_kills_that_came_in_time() -> None:
    done = [
        Kill("compact", "SIGKILL", "dvc", 0.5, True, []),
        Kill(
            "compact", "SIGTERM", "group", 0.5, True, ["artifacts/compact/config.json"], ["rwlock was cut off: removed"]
        ),
        Kill("compact", "SIGINT", "stage", 0.9, False, []),
    ]
    written = report(done, "abc1234")
    assert "| compact | 1 | 1 | 0 | 0 | 1 | 1 | 2 | 1 | 1 |" in written
    assert "| all | 1 | 1 | 0 | 0 | 1 | 1 | 2 | 1 | 1 |" in written
    assert "commit abc1234" in written
