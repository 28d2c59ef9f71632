"""Parameters: params.yaml passes, and a mistake is refused with its key, its value and what is allowed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from stages.check_params import main
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.everything import SECTIONS, check_everything
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.loading import ParameterError, read_yaml
from tvaprune.params.profile_hardware import ProfileHardwareParams

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMS = REPOSITORY / "params.yaml"
CONTENT = read_yaml(PARAMS)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, Any], Path]:
    """params.yaml with one key set to something else; `...` removes it."""

    def write(key: str, value: Any) -> Path:
        content = copy.deepcopy(CONTENT)
        keys = content
        *sections, name = key.split("/")
        for section in sections:
            keys = keys[int(section) if section.isdigit() else section]
        if value is ...:
            del keys[name]
        else:
            keys[name] = value
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps(content))  # which is YAML
        return path

    return write


@pytest.mark.parametrize("path", [PARAMS, *sorted((REPOSITORY / "configs").glob("*.yaml"))], ids=lambda path: path.name)
def test_shipped_parameters_pass(path: Path) -> None:
    check_everything(path)


BROKEN: list[tuple[str, Any, str]] = [
    ("sparsity", 1.0, r"sparsity = 1\.0: .*less than 1"),
    ("sparsity", 0, r"sparsity = 0: .*greater than 0"),
    ("sparsity", "a fifth", r"sparsity = 'a fifth': .*number"),
    ("sparsity", ..., r"top-level key 'sparsity' is missing"),
    ("seed", -1, r"seed = -1: .*greater than or equal to 0"),
    ("seed", 1.5, r"seed = 1\.5: .*integer"),
    ("sparcity", 0.2, r"unknown top-level key 'sparcity'; known keys are .*sparsity"),
    ("learn_masks/sparsity", 0.3, r"learn_masks\.sparsity: sparsity is a top-level key"),
    ("learn_masks", ..., r"section 'learn_masks' is missing"),
    ("fetch_inputs/model/source", "web", r"fetch_inputs\.model\.source = 'web': use package, hub, local"),
    ("fetch_inputs/model/sha256", "abc", r"fetch_inputs\.model\.sha256 = 'abc'"),
    ("fetch_inputs/model/path", "x", r"fetch_inputs\.model: unknown key path; known keys are"),
    ("fetch_inputs/model/member", ..., r"fetch_inputs\.model\.member: missing"),
    ("fetch_inputs/calibration/sources", [], r"fetch_inputs\.calibration\.sources = \[\]"),
    ("fetch_inputs/calibration/sources/1/label", "speeches", r"labels must differ, found speeches, speeches"),
    ("sample_calibration/seq_len", 1, r"sample_calibration\.seq_len = 1"),
    ("sample_calibration/packing", "tight", r"sample_calibration\.packing = 'tight': .*'auto'"),
    ("sample_calibration/mix", {"speeches": -1}, r"sample_calibration\.mix\.speeches = -1"),
    ("sample_calibration/finetune_mix", {"speeches": -1}, r"sample_calibration\.finetune_mix\.speeches = -1"),
    ("check_leaks/ngram", 1, r"check_leaks\.ngram = 1: .*greater than or equal to 2"),
    ("check_leaks/max_overlap", 1.5, r"check_leaks\.max_overlap = 1\.5: .*less than or equal to 1"),
    ("learn_masks/method", "magic", r"learn_masks\.method = 'magic'"),
    ("learn_masks/axes", ["hidden", "hidden"], r"axes = \['hidden', 'hidden'\]: .*each axis at most once"),
    ("learn_masks/axes", ["heads"], r"learn_masks\.axes\.0 = 'heads': .*'kv_heads'"),
    ("learn_masks/tva/steps", 0, r"learn_masks\.tva\.steps = 0: .*greater than or equal to 1"),
    ("learn_masks/tva/ramp", 1.5, r"learn_masks\.tva\.ramp = 1\.5"),
    ("learn_masks/tva/ablation", "vib", r"learn_masks\.tva\.ablation = 'vib': .*'deterministic' or 'vtrans'"),
    ("learn_masks/tva/ste", 3, r"learn_masks\.tva\.ste: unknown key; known keys are ablation, .*steps"),
    ("learn_masks/flap/bias", ..., r"learn_masks\.flap: missing: bias"),
    ("learn_masks/flap/bias", "much", r"learn_masks\.flap\.bias = 'much'"),
    ("learn_masks/bonsai/submodels", 32, r"learn_masks\.bonsai\.submodels = 32: .*multiple of 10"),
    ("learn_masks/paper/kl_weight/hidden", ..., r"learn_masks\.paper\.kl_weight\.hidden: missing"),
    ("adapt_dimensions/multiple", 0, r"adapt_dimensions\.multiple\.hidden = 0: .*greater than or equal to 1"),
    ("adapt_dimensions/multiple", {"hidden": 32}, r"adapt_dimensions\.multiple\.intermediate: missing"),
    ("adapt_dimensions/multiple", "8, 16", r"adapt_dimensions\.multiple = '8, 16': .*one whole number, or one an axis"),
    ("adapt_dimensions/multiple", "fast", r"adapt_dimensions\.multiple = 'fast': .*or measured"),
    ("learn_masks/budget", "latency", r"latency = None with budget = latency: .*\{phase: decode, ratio: 0\.7\}"),
    ("learn_masks/latency", {"phase": "decode", "ratio": 0.7}, r"latency = .* with budget = params: .*null"),
    ("learn_masks/latency", {"phase": "decode", "ratio": 1.2}, r"learn_masks\.latency\.ratio = 1\.2"),
    ("profile_hardware/narrowest_hidden", 0, r"profile_hardware\.narrowest_hidden = 0"),
    ("adapt_dimensions/rounding", "up", r"adapt_dimensions\.rounding = 'up'"),
    ("update_weights/method", "median", r"update_weights\.method = 'median': .*'mean' or 'none'"),
    ("compact/max_rel_logit_diff", 0, r"compact\.max_rel_logit_diff = 0"),
    ("finetune_lora/steps", None, r"steps = None and epochs = None: set exactly one"),
    ("finetune_lora/epochs", 2, r"steps = 100 and epochs = 2\.0: set exactly one"),
    ("finetune_lora/targets", ["lm_head"], r"targets = \['lm_head'\]: give all-linear"),
    ("finetune_lora/targets", "all", r"targets = 'all': give all-linear"),
    ("finetune_lora/rank", 8.5, r"finetune_lora\.rank = 8\.5"),
    ("benchmark_speed/batch_sizes", [], r"benchmark_speed\.batch_sizes = \[\]"),
    ("benchmark_speed/repeats", 1, r"benchmark_speed\.repeats = 1"),
    ("eval_perplexity/window", 1, r"eval_perplexity\.window = 1"),
    ("eval_perplexity/validation", {}, r"eval_perplexity\.validation = \{\}"),
    ("eval_perplexity/test/law", 1, r"eval_perplexity\.test\.law = 1"),
    ("fetch_inputs/heldout/sources/1/kind", "Pure Mathematics", r"heldout\.sources\.1\.kind = 'Pure Mathematics'"),
    ("eval_zeroshot/limit", 1, r"eval_zeroshot\.limit = 1"),
    ("eval_zeroshot/tasks", ["sums"], r"eval_zeroshot\.tasks\.0 = 'sums'"),
    ("eval_zeroshot/mean_of", ["piqa", "boolq"], r"mean_of names boolq, which tasks does not"),
    ("eval_zeroshot/mean_of", ["piqa", "piqa"], r"mean_of names a task twice"),
    (
        "eval_zeroshot/limits",
        3,
        r"eval_zeroshot\.limits: unknown key; known keys are batch_size, limit, mean_of, t",
    ),
]


@pytest.mark.parametrize(("key", "value", "named"), BROKEN, ids=[f"{key}={value}" for key, value, _ in BROKEN])
def test_a_mistake_is_refused_and_named(changed: Callable[[str, Any], Path], key: str, value: Any, named: str) -> None:
    sections = {one.section: one for one in SECTIONS}
    name = key.split("/")[0]
    check = sections[name].load if name in sections else check_everything
    with pytest.raises(ParameterError, match=named):
        check(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "learn_masks/tva/curvature_tokens",
            100,
            r"learn_masks\.tva\.curvature_tokens = 100: .* sample_calibration\.seq_len = 512; use",
        ),
        (
            "sample_calibration/mix",
            {"tales": 2},
            r"sample_calibration\.mix: names tales, but the sources .* are speeches, .*; remove it",
        ),
        (
            "eval_perplexity/test",
            {"wikipedia": 4, "poems": 4},
            r"eval_perplexity\.test: names poems, but the sources .* are wikipedia, mathematics, .*; remove it",
        ),
        (
            "fetch_inputs/calibration/sources/5/label",
            "mine",
            r"sample_calibration\.finetune_mix: names passages, but the sources .* mine",
        ),
    ],
)
def test_sections_that_do_not_fit_together_are_refused_before_any_download(
    changed: Callable[[str, Any], Path], key: str, value: Any, named: str
) -> None:
    with pytest.raises(ParameterError, match=named):
        check_everything(changed(key, value))


LEARN = CONTENT["learn_masks"]
FOR_LATENCY = {**LEARN, "budget": "latency", "latency": {"phase": "decode", "ratio": 0.7}}


def written(tmp_path: Path, **sections: Any) -> Path:
    (tmp_path / "params.yaml").write_text(json.dumps(CONTENT | sections))
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"learn_masks": {**FOR_LATENCY, "method": "flap"}}, r"budget = latency with method = flap: only tva"),
        ({"learn_masks": {**FOR_LATENCY, "method": "paper"}}, r"budget = latency with method = paper: only tva"),
        (
            {"learn_masks": {**FOR_LATENCY, "tva": {**LEARN["tva"], "uniform_layers": True}}},
            r"budget = latency with tva\.uniform_layers = true: .* set it to false",
        ),
        (
            {"learn_masks": {**FOR_LATENCY, "tva": {**LEARN["tva"], "ablation": "deterministic"}}},
            r"budget = latency with tva\.ablation = deterministic",
        ),
        (
            {"learn_masks": FOR_LATENCY, "adapt_dimensions": {**CONTENT["adapt_dimensions"], "multiple": "measured"}},
            r"multiple = measured .*learn_masks\.budget = latency.*; set multiple to a number",
        ),
        (
            {"learn_masks": FOR_LATENCY, "compact": {**CONTENT["compact"], "layout": "padded"}},
            r"compact\.layout = padded with learn_masks\.budget = latency.*; set it to uneven",
        ),
        (
            {"learn_masks": FOR_LATENCY, "adapt_dimensions": {**CONTENT["adapt_dimensions"], "multiple": 64}},
            r"profile_hardware\.intermediate_step = 32: learn_masks\.budget = latency .*set it to a multiple of 64",
        ),
    ],
)
def test_a_latency_budget_refuses_what_it_cannot_be_combined_with(
    tmp_path: Path, sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(ParameterError, match=named):
        check_everything(written(tmp_path, **sections))


def test_osscar_is_refused_where_adaptation_would_cut_what_it_refitted(tmp_path: Path) -> None:
    osscar = {**LEARN, "method": "osscar", "axes": ["intermediate"]}
    with pytest.raises(ParameterError, match=r"adapt_dimensions\.multiple = 32: osscar .*; set it to 1"):
        check_everything(written(tmp_path, learn_masks=osscar))
    one = {**CONTENT["adapt_dimensions"], "multiple": 1}
    check_everything(written(tmp_path, learn_masks=osscar, adapt_dimensions=one))
    uniform = {**CONTENT["compact"], "layout": "uniform"}
    with pytest.raises(ParameterError, match=r"compact\.layout = uniform: osscar refits matrices"):
        check_everything(written(tmp_path, learn_masks=osscar, adapt_dimensions=one, compact=uniform))


def test_dora_is_refused_where_rows_are_padded_with_zeros(tmp_path: Path) -> None:
    padded, dora = {**CONTENT["compact"], "layout": "padded"}, {**CONTENT["finetune_lora"], "use_dora": True}
    with pytest.raises(ParameterError, match=r"use_dora = true with compact\.layout = padded: DoRA divides"):
        check_everything(written(tmp_path, compact=padded, finetune_lora=dora))
    check_everything(written(tmp_path, compact=padded, finetune_lora={**dora, "enabled": False}))
    check_everything(written(tmp_path, finetune_lora=dora))


def test_a_latency_budget_is_in_what_an_artifact_was_made_with_and_the_default_is_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, learn_masks=FOR_LATENCY)
    check_everything(path)
    used = LearnMasksParams.load(path).used()["learn_masks"]
    assert (used["budget"], used["latency"]) == ("latency", {"phase": "decode", "ratio": 0.7})
    assert "sparsity" not in used
    assert "sparsity" not in AdaptDimensionsParams.load(path).used()["adapt_dimensions"]
    assert ProfileHardwareParams.load(path).enabled
    path = written(tmp_path)
    assert set(LearnMasksParams.load(path).used()["learn_masks"]) == {"sparsity", "seed", "method", "axes", "tva"}
    assert set(AdaptDimensionsParams.load(path).used()["adapt_dimensions"]) == {
        "sparsity", "multiple", "rounding", "latency_phase", "slack", "layout",
    }  # fmt: skip
    assert not ProfileHardwareParams.load(path).enabled


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.section)
def test_every_section_refuses_an_unknown_and_a_missing_key(changed: Callable[[str, Any], Path], section: Any) -> None:
    with pytest.raises(ParameterError, match=rf"{section.section}\.?\w*: unknown key"):
        section.load(changed(f"{section.section}/misspelt", 1))
    first = next(name for name in section.model_fields if name not in section.shared)
    with pytest.raises(ParameterError, match=rf"{section.section}\.{first}: missing"):
        section.load(changed(f"{section.section}/{first}", ...))


def test_all_mistakes_are_told_at_once_and_nothing_is_written(
    changed: Callable[[str, Any], Path], tmp_path: Path
) -> None:
    path = changed("eval_zeroshot/limit", 1)
    path.write_text(path.read_text().replace('"window": 1024', '"window": 0'))
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, ["--params", str(path), "--out", str(tmp_path / "ok")])
    assert done.exit_code == 1
    assert "eval_zeroshot.limit = 1" in done.output
    assert "eval_perplexity.window = 0" in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "ok").exists()


def test_the_marker_is_always_the_same(changed: Callable[[str, Any], Path], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    contents = set()
    for value in (0.2, 0.3):
        out = tmp_path / str(value) / "ok"
        assert CliRunner().invoke(app, ["--params", str(changed("sparsity", value)), "--out", str(out)]).exit_code == 0
        contents.add(out.read_bytes())
    assert len(contents) == 1


def test_numbers_as_dvc_writes_them_are_numbers(tmp_path: Path) -> None:
    """`-S finetune_lora.learning_rate=1e-5` puts 1e-05 into params.yaml, which YAML 1.1 reads as text."""
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1e-05"))
    assert "1e-05" in path.read_text()
    assert FinetuneLoraParams.load(path).learning_rate == 1e-5


def test_a_multiple_is_one_number_or_one_an_axis(changed: Callable[[str, Any], Path]) -> None:
    one = AdaptDimensionsParams.load(changed("adapt_dimensions/multiple", 16))
    assert one.multiples() == (16, 16)
    two = AdaptDimensionsParams.load(changed("adapt_dimensions/multiple", {"hidden": 8, "intermediate": 32}))
    assert two.multiples() == (8, 32)


def test_shared_keys_reach_the_stage(changed: Callable[[str, Any], Path]) -> None:
    assert LearnMasksParams.load(changed("sparsity", 0.35)).sparsity == 0.35


@pytest.mark.parametrize(
    ("content", "named"), [("a: [1", "not valid YAML"), ("- 1\n", "expected a mapping"), ("", "expected a mapping")]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(ParameterError, match=named):
        read_yaml(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"nowhere\.yaml: no such file"):
        read_yaml(tmp_path / "nowhere.yaml")
