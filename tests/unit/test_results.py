"""The tables are the metrics' own figures."""

from tools.results import experiments_table, seeds_table, workspace_table


def measured(ppl: float) -> dict:
    return {"validation": {"wikipedia": {"ppl": ppl}}}


MODEL = measured(20.0)
SCORES = {
    "piqa": {"acc": 0.67},
    "hellaswag": {"acc": 0.3, "acc_norm": 0.41},
    "arc_easy": {"acc": 0.52},
    "mean": 0.45,
    "mean_stderr": 0.03,
}
SPEED = {"dense": {"tokens_per_s": 100}, "compact": {"tokens_per_s": 125}}
METRICS = {
    "compact": {
        "params_dense": 134_515_008,
        "params_kept": 113_226_048,
        "sparsity_decoder": 0.2,
        "sparsity_model": 0.158,
        "max_abs_logit_diff": 9e-5,
    },
    "perplexity": {
        "dense": MODEL,
        "compact": measured(30.0),
        "window": 1024,
        "tokens": {"validation": {"wikipedia": 24_000}},
    },
    "speed": {"prefill": SPEED, "decode": SPEED},
    "zeroshot": {"dense": SCORES, "compact": {**SCORES, "mean": 0.4}, "limit": 40},
    "masks": {"seconds": 300.0},
}  # fmt: skip


def test_the_workspace_table_has_a_row_for_each_model_that_was_measured() -> None:
    lines = workspace_table(METRICS).splitlines()
    assert lines[2].startswith("| dense | 134.5 M | 20.0 | 100 (1.00×)")
    assert lines[3].startswith("| pruned | 113.2 M | 30.0 | 125 (1.25×)")
    assert lines[3].endswith("0.670 | 0.410 | 0.520 | 0.400 |")
    assert "LoRA" not in workspace_table(METRICS)
    assert "zero-shot on 40 rows" in workspace_table(METRICS)
    everything = METRICS | {"zeroshot": METRICS["zeroshot"] | {"limit": 0}}  # type: ignore[operator]
    assert "zero-shot on all rows" in workspace_table(everything)


def experiment(
    method: str, sparsity: float, ppl: float, seed: int = 0, speedup: float = 1.2, steps: int = 100, **tva: float
) -> dict:
    metrics = {
        "metrics/perplexity.json": {"data": {"dense": MODEL, "compact": measured(ppl)}},
        "metrics/masks.json": {"data": {"seconds": 10.0}},
        "metrics/speed.json": {"data": {"prefill": {"speedup": speedup}}},
    }
    learn = {"method": method, "axes": ["hidden"], "tva": {"clip_ratio": 4.0, **tva}}
    content = {"seed": seed, "sparsity": sparsity, "learn_masks": learn, "finetune_lora": {"steps": steps}}
    params = {"params.yaml": {"data": content}}
    return {"rev": method * 3, "data": {"metrics": metrics, "params": params}}


def test_experiments_are_sorted_by_sparsity_and_perplexity_and_say_what_changed() -> None:
    shown = [{**experiment("tva", 0.2, 30), "experiments": [{"revs": [experiment("flap", 0.2, 40, clip_ratio=1.0)]}]}]
    failed = {**experiment("depth", 0.2, 30), "error": {"msg": "Experiment run failed", "type": ""}}
    shown += [{"rev": "empty", "data": None}, failed, experiment("random", 0.1, 90)]
    running = {"state": "running", "name": "workspace"}
    shown[0]["experiments"].append({"revs": [experiment("bonsai", 0.2, 30)], "executor": running})
    shown[0]["experiments"][0]["executor"] = {"state": "success", "name": "dvc-task"}
    rows = [[cell.strip() for cell in row.split("|")] for row in experiments_table(shown).splitlines()[2:]]
    assert [row[1] for row in rows] == ["random", "tva", "flap"]
    assert [row[3] for row in rows] == ["", "", "learn_masks.tva.clip_ratio=1.0"]
    assert rows[1][5:8] == ["30.0", "", "1.50"]


def test_speeds_that_an_experiment_only_inherited_are_left_out() -> None:
    shown = [experiment("tva", 0.2, 30), experiment("flap", 0.2, 40), experiment("depth", 0.2, 50, speedup=1.3)]
    rows = [row.split("|")[9].strip() for row in experiments_table(shown).splitlines()[2:]]
    assert rows == ["1.20×", "", "1.30×"]


def test_seeds_of_one_setting_make_one_row_and_single_runs_none() -> None:
    shown = [experiment("tva", 0.2, ppl, seed, steps=seed) for seed, ppl in enumerate((28.0, 30.0, 32.0, 30.0))]
    shown += [shown[0], experiment("tva", 0.2, 50, seed=1, clip_ratio=1.0), experiment("tva", 0.5, 60)]
    (row,) = seeds_table(shown).splitlines()[2:]
    assert row == "| tva | hidden |  | 0.2 | 0 1 2 3 | 30.0 | 1.63 | 5.4% |"
