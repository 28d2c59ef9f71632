"""Runs are saved from up-to-date metrics alone, and the tables are the saved figures."""

import hashlib
import json
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tools import results, run_rows
from tools.results import Results
from tools.saved_runs import Run, record, save
from tvaprune.measures.columns import COLUMNS, cell, column, value_at
from tvaprune.results import of_another_run, own_table, what_to_do_next, workspace_run

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "metrics/results"
PIPELINE = """
stages:
  check: {cmd: check, params: [seed, learn, eval, speed], outs: [artifacts/params.ok]}
  fetch: {cmd: fetch, deps: [artifacts/params.ok, stages/fetch.py], params: [fetch], outs: [data/model]}
  learn:
    cmd: learn
    deps: [data/model/config.json, data/model, stages/learn.py]
    params: [seed, learn.method, "learn.${learn.method}"]
    outs: [artifacts/masks]
    metrics: [metrics/masks.json: {cache: false}]
  eval: {cmd: eval, deps: [artifacts/masks, stages/eval.py], params: [eval], metrics: [metrics/perplexity.json: {}]}
  speed: {cmd: speed, deps: [artifacts/masks, stages/eval.py], params: [speed], metrics: [metrics/speed.json: {}]}
"""
PARAMS = {
    "seed": 3,
    "fetch": {"path": "/somewhere/texts"},
    "learn": {"method": "flap", "flap": {"windows": 4}, "tva": {"steps": 5}},
    "eval": {"window": 8},
    "speed": {"repeats": 3},
}


def md5(path: str) -> str:
    return hashlib.md5(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else f"of {path}"


def write_lock(*stages: str) -> None:
    """As after `dvc repro` of these stages; the entries of the others stay."""
    yaml = YAML(typ="safe", pure=True)
    entries, params = yaml.load(PIPELINE)["stages"], yaml.load(Path("params.yaml"))
    lock = Path("dvc.lock")
    locked = yaml.load(lock)["stages"] if lock.exists() else {}
    for name in stages:
        entry = entries[name]
        keys = [key.replace("${learn.method}", params["learn"]["method"]) for key in entry["params"]]
        outs = [*entry.get("outs", []), *(path for each in entry.get("metrics", []) for path in each)]
        hashed = f"{value_at(params, 'learn.method')} " if name == "learn" else ""
        locked[name] = {
            "cmd": entry["cmd"],
            "deps": [{"path": path, "md5": _hash(path, locked)} for path in entry.get("deps", [])],
            "params": {"params.yaml": {key: value_at(params, key) for key in keys}},
            "outs": [{"path": p, "md5": md5(p) if p.startswith("metrics") else f"{hashed}{p}"} for p in outs],
        }
    yaml.dump({"stages": locked}, lock)


def _hash(path: str, locked: dict[str, Any]) -> str:
    made = {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}
    return made.get(path) or md5(path)


ALL = ("check", "fetch", "learn", "eval", "speed")


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pipeline that has run, committed."""
    monkeypatch.chdir(tmp_path)
    for folder in ("stages", "metrics"):
        Path(folder).mkdir()
    for name in ("fetch", "learn", "eval"):
        Path(f"stages/{name}.py").write_text(name)
    Path("dvc.yaml").write_text(PIPELINE)
    write_params(PARAMS)
    for name in ("masks", "perplexity", "speed"):
        Path(f"metrics/{name}.json").write_text(json.dumps({name: 1}))
    write_lock(*ALL)
    commit()
    return tmp_path


def write_params(params: dict[str, Any]) -> None:
    YAML().dump(params, Path("params.yaml"))


def commit() -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "state"]):
        subprocess.run(["git", *command], check=True)


def test_a_saved_run_says_what_it_was_made_with(pipeline: Path) -> None:
    path, left_out = save("flap_0.2", Run.of_workspace())
    content = json.loads(path.read_text())
    assert left_out == {}
    assert set(content["metrics"]) == {"masks", "perplexity", "speed"}
    assert (len(content["commit"]), content["seed"], "dirty" in content) == (40, 3, False)
    assert content["params"]["learn"] == {"method": "flap", "flap": {"windows": 4}}
    assert content["params"]["fetch"] == {"path": "texts"}
    assert {"processor", "threads", "dtype", "torch"} <= set(content["machine"])


def changed(**sections: Any) -> None:
    write_params({**PARAMS, **sections})


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda: changed(eval={"window": 9}), {"masks", "speed"}),
        (lambda: changed(seed=4), set()),
        (lambda: changed(learn={**PARAMS["learn"], "tva": {"steps": 6}}), {"masks", "perplexity", "speed"}),
        (lambda: changed(fetch={"path": "other"}), set()),
        (lambda: Path("stages/learn.py").write_text("changed"), set()),
        (lambda: Path("stages/fetch.py").write_text("changed"), set()),
        (lambda: Path("stages/eval.py").write_text("changed"), {"masks"}),
        (lambda: Path("metrics/speed.json").write_text("{}"), {"masks", "perplexity"}),
    ],
)  # fmt: skip
def test_metrics_of_stages_that_are_not_up_to_date_are_left_out(pipeline: Path, change: Any, kept: set[str]) -> None:
    change()
    if not kept:
        with pytest.raises(ValueError, match="no stage that measures is up to date"):
            record("row", Run.of_workspace())
        return
    content, left_out = record("row", Run.of_workspace())
    assert set(content["metrics"]) == kept
    assert {Path(path).stem for path in left_out} == {"masks", "perplexity", "speed"} - kept


def test_the_speed_of_other_masks_is_left_out(pipeline: Path) -> None:
    """As after `dvc repro eval`: the masks and the perplexity are new, metrics/speed.json is of an earlier run."""
    changed(learn={**PARAMS["learn"], "method": "tva"})  # type: ignore[dict-item]
    write_lock("check", "fetch", "learn", "eval")
    content, left_out = record("row", Run.of_workspace())
    assert set(content["metrics"]) == {"masks", "perplexity"}
    assert left_out == {"metrics/speed.json": "speed ran with another artifacts/masks"}
    with pytest.raises(ValueError, match="row: speed ran with another artifacts/masks"):
        save("row", Run.of_workspace(), ["eval", "speed"])
    assert not Path("metrics/results").exists()
    assert "speed" not in content["params"]
    assert content["params"]["learn"] == {"method": "tva", "tva": {"steps": 5}}


def test_changed_code_is_recorded_and_an_experiment_is_read_from_its_commit(pipeline: Path) -> None:
    base = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    Path("stages/eval.py").write_text("changed")
    Path("metrics/perplexity.json").write_text('{"perplexity": 2}')
    write_lock("eval")
    assert record("row", Run.of_workspace())[0]["dirty"] is True
    commit()
    subprocess.run(["git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/mine", "HEAD"], check=True)
    subprocess.run(["git", "reset", "-q", "--hard", base], check=True)
    content, left_out = record("row", Run.of_experiment("mine"))
    assert content["metrics"] == {"masks": {"masks": 1}, "perplexity": {"perplexity": 2}}
    assert set(left_out) == {"metrics/speed.json"}  # it did not run the benchmark with the changed code
    assert (content["commit"], content["dirty"]) == (base, True)
    with pytest.raises(ValueError, match="0 experiments have this name"):
        Run.of_experiment("other")


def test_an_experiment_was_made_on_the_machine_that_its_benchmark_names(pipeline: Path) -> None:
    base = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    Path("metrics/speed.csv").write_text("latency_ms,dtype,machine\n1.5,float16,Some processor\n")
    Path("metrics/speed.json").write_text('{"threads": 77}')
    write_lock("speed")
    commit()
    subprocess.run(["git", "update-ref", f"refs/exps/{base[:2]}/{base[2:]}/mine", "HEAD"], check=True)
    made_on, here = (record("row", run)[0]["machine"] for run in (Run.of_experiment("mine"), Run.of_workspace()))
    assert made_on == here | {"processor": "Some processor", "threads": 77, "dtype": "float16"}
    assert here["processor"] != "Some processor"


@pytest.mark.parametrize("name", ["default", "a/b", "", ".hidden"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a name has letters"):
        save(name, Run(lambda path: None, "", False))


def saved_run(name: str, ppl: float, seed: int = 0, **params: Any) -> dict[str, Any]:
    def measured(ppl: float) -> dict[str, Any]:
        validation = {"wikipedia": {"ppl": ppl, "ratio_to_dense": ppl / 16}}
        return {"validation": validation, "test": {"news": {"ppl": ppl, "ratio_to_dense": ppl / 20}}}

    ratios = {"validation_ratio": ppl / 20, "test_ratio": ppl / 10}
    task = {"acc": 0.5, "acc_stderr": 0.02, "acc_norm": 0.6, "acc_norm_stderr": 0.03}
    scores = {"piqa": task, "hellaswag": task, "mean": 0.55, "mean_stderr": 0.01}
    differences = {"mean_minus_dense": 0.05, "mean_minus_dense_stderr": 0.008}
    metrics = {
        "perplexity": {"dense": measured(20.0), "compact": measured(ppl) | ratios},
        "zeroshot": {"limit": 9, "dense": scores | {"mean": 0.5}, "compact": scores | differences},
        "masks": {"seconds": 61.4, "steps": 150},
        "speed": {
            "repeats": 5,
            "decode": {"dense": {"tokens_per_s": 40.0}, "compact": {"tokens_per_s": 50.0, "speedup_paired": 1.2}},
        },
        "quantized": {"compact": {"q8_0": {"bytes": 5e6, "decode": {"tokens_per_s": 71.2}}}},
    }
    content = {"sparsity": 0.2, "learn_masks": {"method": "tva", "axes": ["intermediate"]}, **params}
    content["eval_zeroshot"] = {"mean_of": ["piqa", "hellaswag"]}
    return {"name": name, "commit": "0" * 40, "seed": seed, "params": content, "metrics": metrics}


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("validation", "compact", "30.0"),
        ("validation", "dense", "20.0"),
        ("validation", "finetuned", ""),
        ("validation_ratio", "compact", "1.50"),
        ("validation_ratio.wikipedia", "compact", "1.88"),
        ("validation_ratio.wikipedia", "dense", "1.00"),
        ("test_ratio", "compact", "3.00"),
        ("test_ratio.news", "compact", "1.50"),
        ("test_ratio", "dense", "1.00"),
        ("lora_validation", "compact", ""),
        ("piqa", "compact", "0.500"),
        ("hellaswag_stderr", "compact", "0.600 ± 0.030"),
        ("mean_minus_dense", "compact", "+0.050 ± 0.008"),
        ("mean_minus_dense", "dense", ""),
        ("mean_of_dense", "compact", "1.10"),
        ("margin_of_dense", "compact", "1.40"),  # guessing has 0.375
        ("margin_of_dense", "dense", "1.00"),
        ("decode_rate", "compact", "50 (1.20×)"),
        ("decode_rate", "dense", "40 (1.00×)"),
        ("prefill", "compact", ""),
        ("seconds", "compact", "61"),
        ("axes", "compact", "intermediate"),
        ("params.sparsity", "compact", "0.2"),
        ("metrics.masks.steps", "compact", "150"),
        ("quantized.q8_0.size", "compact", "5"),
        ("quantized.q8_0.decode", "compact", "71"),
        ("quantized.q4_0.size", "compact", ""),
    ],
)
def test_a_cell_is_the_saved_figure(name: str, model: str, expected: str) -> None:
    assert cell(column(name), [saved_run("a", 30.0)], model) == expected


def test_several_runs_make_a_mean_with_a_deviation() -> None:
    runs = [saved_run(str(seed), ppl, seed) for seed, ppl in enumerate((28.0, 30.0, 32.0))]
    assert cell(column("validation"), runs, "compact") == "30.0 ± 2"
    assert cell(column("seeds"), runs, "compact") == "0 1 2"
    assert cell(column("method"), runs, "compact") == "tva"
    del runs[1]["metrics"]["perplexity"]
    assert cell(column("validation"), runs, "compact") == "", "one run lacks it"


def test_the_perplexity_of_several_texts_is_their_geometric_mean() -> None:
    run = saved_run("a", 9.0)
    run["metrics"]["perplexity"]["compact"]["validation"]["news"] = {"ppl": 16.0}
    assert cell(column("validation"), [run], "compact") == "12.0"


@pytest.mark.parametrize(
    ("ppl", "written"), [(9.994, "9.99"), (9.996, "10.0"), (999.94, "999.9"), (999.96, "1,000"), (12345.6, "12,346")]
)
def test_large_figures_have_as_many_digits_once_they_are_rounded(ppl: float, written: str) -> None:
    assert cell(column("validation"), [saved_run("a", ppl)], "compact") == written


def test_recovery_is_a_share_of_the_lost_log_likelihood() -> None:
    run = saved_run("a", 80.0)
    run["metrics"]["perplexity"]["finetuned"] = {"validation_ratio": 2.0, "test_ratio": 8.0}
    assert cell(column("recovered_validation"), [run], "compact") == "50%"
    assert cell(column("recovered_test"), [run], "compact") == "0%"
    assert cell(column("lora_validation_ratio"), [run], "compact") == "2.00"
    run["metrics"]["zeroshot"] = {
        "compact": {"mean": 0.5, "mean_stderr": 0.1},
        "finetuned": {"mean": 0.6, "mean_stderr": 0.2},
    }
    assert cell(column("lora_mean_stderr"), [run], "compact") == "0.600 ± 0.200"


def test_every_column_is_empty_where_nothing_was_measured() -> None:
    nothing = {"name": "a", "seed": 0, "params": {"sparsity": 0.2}, "metrics": {}}
    for name, each in COLUMNS.items():
        if name not in ("sparsity", "seeds"):
            assert cell(each, [nothing], "compact") == "", name
    with pytest.raises(ValueError, match="no column validtion; columns are method"):
        column("validtion")


DEFINITIONS = """
rows:
  low: {set: {sparsity: 0.2, seed: 0}, target: eval_perplexity}
  high: {set: {sparsity: 0.5}, target: eval_perplexity}
tables:
  one:
    columns: [method, {"0.2": [validation, seconds], "0.5": [validation]}]
    rows: [{label: tva, saved: {"0.2": low, "0.5": high}}]
    notes: [zeroshot, learning]
"""


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with one table, written from two saved runs."""
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "metrics/results"):
        Path(folder).mkdir(parents=True)
    Path("docs/results.yaml").write_text(DEFINITIONS)
    Path("dvc.yaml").write_text("stages: {eval_perplexity: {}}")
    write_params({"seed": 0, "sparsity": 0.2})
    for name, ppl, sparsity in (("low", 30.0, 0.2), ("high", 60.0, 0.5)):
        Path(f"metrics/results/{name}.json").write_text(json.dumps(saved_run(name, ppl, sparsity=sparsity)))
    Path("README.md").write_text("# Results\n\n<!-- table: one -->\n<!-- end of table -->\n\nText.\n")
    results.main(write=True)
    return tmp_path


def test_a_page_is_filled_once_and_for_all(documents: Path) -> None:
    text = Path("README.md").read_text()
    assert text == (
        "# Results\n\n<!-- table: one -->\n"
        "|  | method | 0.2: validation ppl | 0.2: s | 0.5: validation ppl |\n|---|---|---|---|---|\n"
        "| tva | tva | 30.0 | 61 | 60.0 |\n\n"
        "Zero-shot on 9 rows of each task (standard error of the mean about 0.010). The mean changes by +0.050 ± "
        "0.008 by pruning, where the rows of both models are paired. Masks learned in 61 s.\n"
        "<!-- end of table -->\n\nText.\n"
    )
    results.main(write=True)
    assert Path("README.md").read_text() == text
    results.main(checked=True)


def test_the_group_of_columns_stands_in_a_name() -> None:
    table = results.Table.model_validate(
        {"columns": [{"low": ["sparsity"], "high": ["sparsity"]}], "rows": [{"label": "tva", "saved": "a_{group}"}]}
    )
    runs = {f"a_{name}": saved_run(name, 30.0, sparsity=sparsity) for name, sparsity in (("low", 0.2), ("high", 0.5))}
    assert table.names() == ["a_high", "a_low"]
    assert results.Results({}, {}, runs).render(table).splitlines()[-1] == "| tva | 0.2 | 0.5 |"


def test_a_row_of_a_quantised_type_shows_that_type() -> None:
    rows = [
        {"label": "pruned, q8_0", "saved": "low", "type": "q8_0"},
        {"label": "pruned, q4_0", "saved": "low", "type": "q4_0"},  # not measured
    ]
    table = results.Table.model_validate(
        {"columns": ["quantized.{type}.size", "quantized.{type}.decode"], "rows": rows}
    )
    drawn = results.Results({}, {}, {"low": saved_run("low", 30.0)}).render(table)
    assert drawn == "|  | MB | decode tok/s |\n|---|---|---|\n| pruned, q8_0 | 5 | 71 |"


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        ("README.md", "30.0", "29.0", "README.md: table one is not what the files give"),
        ("README.md", "<!-- end of table -->", "", "README.md: a table has no end"),
        ("metrics/results/low.json", '"ppl": 30.0', '"ppl": 31.0', "README.md: table one is not what the files give"),
        ("docs/results.yaml", 'high}}]', 'highest}}]', "table one: metrics/results/highest.json is missing"),
        ("docs/results.yaml", 'high}}]', 'highest}}]', "metrics/results/high.json is in no table"),
        ("docs/results.yaml", "{sparsity: 0.5}", "{sparsity: 0.4}", "high.json was run with another sparsity"),
        ("docs/results.yaml", "seed: 0", "seed: 1", "low.json was run with another seed"),
        ("README.md", "table: one", "table: two", "docs/results.yaml has no table two"),
        ("docs/results.yaml", "seconds]", "secnds]", "no column secnds"),
        ("docs/results.yaml", "label: tva", "lable: tva", "table one: rows.0.label: Field required"),
    ],
)  # fmt: skip
def test_the_check_fails(
    documents: Path, path: str, old: str, new: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = Path(path).read_text()
    assert old in content
    Path(path).write_text(content.replace(old, new))
    with pytest.raises(SystemExit):
        results.main(checked=True)
    assert problem in capsys.readouterr().err


def test_the_tables_of_this_repository_are_what_its_files_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert results.check(Results.read()) == []


def test_saved_runs_name_commits_of_this_history() -> None:
    git = ["git", "-C", str(REPOSITORY)]
    known = subprocess.run([*git, "rev-list", "HEAD"], capture_output=True, text=True).stdout.split()
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout
    if not known or shallow.strip() != "false":
        pytest.skip("needs the whole history")
    commits = {path.stem: json.loads(path.read_text())["commit"] for path in RESULTS.glob("*.json")}
    assert {name: commit for name, commit in commits.items() if commit not in known} == {}


def test_the_rows_of_this_repository_set_parameters_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tools.run_rows` checks their values too, which takes a second a row."""
    monkeypatch.chdir(REPOSITORY)
    params = YAML(typ="safe", pure=True).load(Path("params.yaml"))
    mixes = ("sample_calibration.mix.", "sample_calibration.finetune_mix.")
    for name, row in run_rows.read_definitions().items():
        for key in row.set:
            section = value_at(params, key.rpartition(".")[0], {}) if "." in key else params
            assert key.rpartition(".")[2] in section or key.startswith(mixes), f"{name}: {key}"


def test_wrong_rows_are_refused_together_before_anything_runs() -> None:
    params = (REPOSITORY / "params.yaml").read_text()
    rows = {
        name: run_rows.Row(set={key: value}, target="compact")
        for name, key, value in [
            ("good", "learn_masks.flap.windows", 8),
            ("misspelt", "learn_masks.flap.wndows", 8),
            ("nowhere", "learn_maks.flap.windows", 8),
            ("wrong", "sparsity", 2),
        ]
    }
    with pytest.raises(ValueError, match=r"misspelt: learn_masks\.flap\.wndows: unknown key") as error:
        run_rows.check_rows(params, rows)
    assert "nowhere: learn_maks.flap.windows: params.yaml has no section learn_maks.flap" in str(error.value)
    assert "wrong: sparsity = 2" in str(error.value)
    assert "good" not in str(error.value)
    text = run_rows.with_values(params, rows["good"])
    assert value_at(YAML(typ="safe").load(text), "learn_masks.flap") == {
        "windows": 8,
        "allocation": "adaptive",
        "bias": True,
    }


def test_each_combination_of_values_is_a_row(documents: Path) -> None:
    definition = "{each: {seed: [1, 2], sparsity: [0.2, 0.5]}, set: {learn_masks.method: flap}}"
    Path("docs/results.yaml").write_text(f"rows:\n  'a_s{{seed}}_{{sparsity}}': {definition}\n  b: {{}}\n")
    rows = run_rows.read_definitions()
    assert list(rows) == ["a_s1_0.2", "a_s1_0.5", "a_s2_0.2", "a_s2_0.5", "b"]
    assert rows["a_s2_0.5"] == run_rows.Row(
        set={"seed": 2, "sparsity": 0.5, "learn_masks.method": "flap"}, target="eval_perplexity"
    )
    assert rows["b"].set == {}


@pytest.mark.parametrize(
    ("definition", "problem"),
    [
        ("a/b: {set: {}, target: eval_perplexity}", "a name has letters"),
        ("a: {set: {}, target: [eval_perplexty]}", "a: no stage eval_perplexty"),
        ("a: {sets: {}, target: eval_perplexity}", "a: sets: Extra inputs"),
        ("'a_{seed}': {set: {seed: 1}}", "a_{seed}: {seed} is no key of `each`"),
        ("a: {each: {seed: [1, 2]}}", "a: a second row is named a"),
    ],
)
def test_wrong_definitions_of_rows_are_refused(documents: Path, definition: str, problem: str) -> None:
    Path("docs/results.yaml").write_text(f"rows:\n  {definition}\n")
    with pytest.raises(ValueError, match=re.escape(problem)):
        run_rows.read_definitions()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_params_are_restored_whatever_ends_the_rows(documents: Path, error: type[BaseException]) -> None:
    before, handler = Path("params.yaml").read_bytes(), signal.getsignal(signal.SIGTERM)

    def end() -> None:
        with run_rows.params_restored():
            Path("params.yaml").write_text("changed")
            with pytest.raises(BlockingIOError), run_rows.params_restored():
                pass
            raise error

    with pytest.raises(error):
        end()
    assert Path("params.yaml").read_bytes() == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_params_are_restored_after_a_kill_at_the_next_start(documents: Path) -> None:
    before = Path("params.yaml").read_bytes()
    Path(".dvc/tmp").mkdir(parents=True)
    Path(".dvc/tmp/params-before-rows.yaml").write_bytes(before)
    Path("params.yaml").write_text("changed")
    with run_rows.params_restored():
        assert Path("params.yaml").read_bytes() == before


def test_a_copy_of_params_that_was_cut_short_is_not_restored(documents: Path) -> None:
    before = Path("params.yaml").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
    try:
        with pytest.raises(OSError, match="File too large"), run_rows.params_restored():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with run_rows.params_restored():
        assert Path("params.yaml").read_bytes() == before


def test_a_row_that_fails_stops_no_other(
    documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run_row(name: str, row: run_rows.Row, params: str) -> str | None:
        ran.append((name, params))
        return "dvc repro ended with 255" if name == "low" else None

    monkeypatch.setattr(run_rows, "run_row", run_row)
    monkeypatch.setattr(run_rows, "check_everything", lambda path: None)
    with pytest.raises(SystemExit):
        run_rows.main(["low", "high"])
    assert [(name, "sparsity: 0.5" in params) for name, params in ran] == [("low", False), ("high", True)]
    shown = capsys.readouterr().err
    assert "[1/2] low: dvc repro ended with 255, 0 min" in shown
    assert "[2/2] high: saved, 0 min" in shown
    assert "1 of 2 rows failed" in shown


def test_the_own_table_has_no_empty_columns_and_no_empty_rows() -> None:
    run = saved_run("default", 30.0)
    del run["metrics"]["zeroshot"]
    lines = own_table(run).splitlines()
    assert "validation ppl" in lines[0]
    assert "PIQA" not in lines[0]
    assert not any(line.startswith("| pruned + LoRA") for line in lines)
    with pytest.raises(ValueError, match="run dvc repro first"):
        own_table({"name": "default", "seed": 0, "params": {}, "metrics": {}})


def test_figures_of_another_run_are_left_out(tmp_path: Path) -> None:
    """compact ran again, and eval_perplexity after it; the speed is that of the model before."""
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics").mkdir()
    for name in ("masks", "compact", "perplexity", "speed"):
        (tmp_path / "metrics" / f"{name}.json").write_text("{}")
    assert set(workspace_run(tmp_path)["metrics"]) == {"masks", "compact", "perplexity", "speed"}  # no dvc.lock

    def stage(outs: dict[str, str], deps: dict[str, str]) -> dict[str, Any]:
        kinds = {"deps": deps, "outs": outs}
        return {kind: [{"path": path, "md5": md5} for path, md5 in files.items()] for kind, files in kinds.items()}

    def lock(masks: str) -> None:
        stages = {
            "learn_masks": stage({"artifacts/masks": masks, "metrics/masks.json": "1"}, {"data/model": "1"}),
            "compact": stage({"artifacts/compact": "2", "metrics/compact.json": "2"}, {"artifacts/masks": "1"}),
            "eval_perplexity": stage({"metrics/perplexity.json": "1"}, {"artifacts/compact": "2"}),
            "benchmark_speed": stage({"metrics/speed.json": "1"}, {"artifacts/compact": "1"}),
        }
        (tmp_path / "dvc.lock").write_text(json.dumps({"stages": stages}))

    lock(masks="1")
    assert of_another_run(tmp_path) == ["speed"]
    assert set(workspace_run(tmp_path)["metrics"]) == {"masks", "compact", "perplexity"}
    lock(masks="3")  # learned anew, and nothing after it
    assert of_another_run(tmp_path) == ["compact", "perplexity", "speed"]


def test_what_to_do_next_names_the_models_that_are_there(tmp_path: Path) -> None:
    assert list(what_to_do_next(tmp_path)) == []
    for name in ("compact", "finetuned"):
        (tmp_path / "artifacts" / name).mkdir(parents=True)
    (tmp_path / "artifacts/finetuned/meta.json").write_text("{}")  # as without fine-tuning
    (tmp_path / "artifacts/compact/config.json").write_text("{}")
    first, *rest = what_to_do_next(tmp_path)
    assert first == "artifacts/compact: the pruned model"
    assert any('generate artifacts/compact "The river"' in line for line in rest)
    assert not any("finetuned" in line for line in rest)
