"""State that outlives a kill: keyed by everything, replaced whole, one writer."""

import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tvaprune.resume import ResumableRun, StateInUseError, hash_files


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with an input, which is also the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "input"
    path.mkdir()
    (path / "a.txt").write_text("one")
    return path


def interrupted(settings: dict[str, int], code: Path, state: dict[str, object]) -> Path:
    """A run that saved its state and then died; its directory."""
    run = ResumableRun("stage", settings, [code])
    with suppress(KeyboardInterrupt), run:
        run.save(state)
        raise KeyboardInterrupt
    return run.directory


def test_an_interrupted_run_is_resumed_and_a_finished_one_forgotten(code: Path) -> None:
    interrupted({"steps": 3}, code, {"step": 2, "weights": torch.arange(3.0)})
    with ResumableRun("stage", {"steps": 3}, [code]) as run:
        state = run.load()
        assert state is not None
        assert state["step"] == 2
        assert torch.equal(state["weights"], torch.arange(3.0))
    with ResumableRun("stage", {"steps": 3}, [code]) as run:
        assert run.load() is None


def test_other_settings_inputs_or_stages_find_no_state(code: Path) -> None:
    interrupted({"steps": 3}, code, {"step": 2})
    with ResumableRun("stage", {"steps": 4}, [code]) as run:
        assert run.load() is None
    with ResumableRun("other", {"steps": 3}, [code]) as run:
        assert run.load() is None
    (code / "a.txt").write_text("two")
    with ResumableRun("stage", {"steps": 3}, [code]) as run:
        assert run.load() is None
    (code / "a.txt").write_text("one")
    with ResumableRun("stage", {"steps": 3}, [code]) as run:
        assert run.load() == {"step": 2}


def test_another_version_of_torch_finds_no_state(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted({"steps": 3}, code, {"step": 2})
    monkeypatch.setattr(torch, "__version__", "0.0")
    with ResumableRun("stage", {"steps": 3}, [code]) as run:
        assert run.load() is None


def test_a_damaged_state_is_ignored_and_said(code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = interrupted({}, code, {"step": 2})
    path = directory / "state.pt"
    path.write_bytes(path.read_bytes()[:50])
    with ResumableRun("stage", {}, [code]) as run:
        assert run.load() is None
    assert f"{path}: damaged" in (said := capsys.readouterr().err)
    assert "stage starts from the beginning" in said


@pytest.mark.parametrize("error", [PermissionError("state.pt"), MemoryError(), RuntimeError("can't allocate memory")])
def test_a_state_that_cannot_be_read_is_not_thrown_away(
    code: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    interrupted({}, code, {"step": 2})

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(type(error)), ResumableRun("stage", {}, [code]) as run:
            run.load()
    with ResumableRun("stage", {}, [code]) as run:
        assert run.load() == {"step": 2}


def test_a_kill_while_saving_leaves_the_state_before(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ResumableRun("stage", {}, [code])

    def half(state: object, stream: object) -> None:
        stream.write(b"half of a state")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), run:
        run.save({"step": 1})
        monkeypatch.setattr(torch, "save", half)
        run.save({"step": 2})
    monkeypatch.undo()
    monkeypatch.chdir(code.parent)
    with ResumableRun("stage", {}, [code]) as again:
        assert again.load() == {"step": 1}


def test_state_that_would_run_code_is_not_read(code: Path) -> None:
    directory = interrupted({}, code, {"step": 2})
    torch.save({"step": Path("a")}, directory / "state.pt")
    with ResumableRun("stage", {}, [code]) as run:
        assert run.load() is None


def test_a_second_run_of_several_processes_is_refused_and_told_what_to_do(code: Path) -> None:
    with (
        ResumableRun("stage", {"a": 1}, [code]),
        pytest.raises(StateInUseError, match=r"stage: another process is computing the same result .* Wait for it"),
        ResumableRun("stage", {"a": 1}, [code], waits=False),
    ):
        pytest.fail("two writers of the same state")


def test_a_second_run_of_one_process_waits_for_the_first(code: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two workers of a queue of experiments come to the same masks."""
    states = []

    def second() -> None:
        with ResumableRun("stage", {"a": 1}, [code]) as run:
            states.append(run.load())

    waiting = threading.Thread(target=second)
    with ResumableRun("stage", {"a": 1}, [code]) as first:
        first.save({"step": 1})
        waiting.start()
        while "stage: another process is computing the same result" not in capfd.readouterr().err:
            assert waiting.is_alive()
        assert states == []
    waiting.join()
    assert states == [None]  # the first ended well


def test_stages_that_run_at_the_same_time_keep_their_own_states(code: Path) -> None:
    with suppress(KeyboardInterrupt), ResumableRun("one", {}, [code]) as one, ResumableRun("two", {}, [code]) as two:
        one.save({"step": 1})
        two.save({"step": 2})
        raise KeyboardInterrupt
    with ResumableRun("one", {}, [code]) as one, ResumableRun("two", {}, [code]) as two:
        assert (one.load(), two.load()) == ({"step": 1}, {"step": 2})


def test_a_process_that_does_not_write_reads_the_state_and_leaves_it(code: Path) -> None:
    interrupted({}, code, {"step": 1})
    with ResumableRun("stage", {}, [code]) as writer:
        with ResumableRun("stage", {}, [code], writer=False) as reader:
            assert reader.load() == {"step": 1}
            with pytest.raises(AssertionError, match="only the writer"):
                reader.save({"step": 2})
        assert writer.load() == {"step": 1}


def test_the_lock_of_a_killed_process_does_not_stay(code: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from tvaprune.resume import ResumableRun\n"
        f"with ResumableRun('stage', {{}}, [Path({str(code)!r})]) as run:\n"
        "    run.save({'step': 7}); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{script}"], cwd=".")
    assert done.returncode == -9
    with ResumableRun("stage", {}, [code]) as run:
        assert run.load() == {"step": 7}


def test_state_lives_under_the_original_repository(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queued experiment runs in a copy that is removed; $DVC_ROOT is where it came from."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "original"))
    directory = interrupted({}, code, {"step": 1})
    assert directory.parent == tmp_path / "original" / ".resume"


def test_a_hash_sees_names_and_contents_but_not_where_the_directory_lies(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> Path:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path / name

    same = [hash_files([tree(name, {"a": "1", "b/c": "2"})]) for name in ("x", "y")]
    assert same[0] == same[1]
    assert hash_files([tree("z", {"a": "2", "b/c": "1"})]) != same[0]
    assert hash_files([tree("v", {"a": "1", "b/d": "2"})]) != same[0]
