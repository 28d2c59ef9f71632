"""Check all sections at once, so that a mistake in the last stage's section stops the run before the first stage."""

from pathlib import Path
from typing import Any

from tvaprune.options.masks import METHOD_OPTIONS
from tvaprune.params.adapt_dimensions import AdaptDimensionsParams
from tvaprune.params.benchmark_speed import BenchmarkSpeedParams
from tvaprune.params.check_leaks import CheckLeaksParams
from tvaprune.params.compact import CompactParams
from tvaprune.params.eval_perplexity import EvalPerplexityParams
from tvaprune.params.eval_zeroshot import EvalZeroshotParams
from tvaprune.params.fetch_inputs import FetchInputsParams
from tvaprune.params.finetune_lora import FinetuneLoraParams
from tvaprune.params.learn_masks import LearnMasksParams
from tvaprune.params.loading import ParameterError, StageParams, read_yaml
from tvaprune.params.profile_hardware import ProfileHardwareParams
from tvaprune.params.quantize import QuantizeParams
from tvaprune.params.report import ReportParams
from tvaprune.params.sample_calibration import SampleCalibrationParams
from tvaprune.params.update_weights import UpdateWeightsParams

SECTIONS: tuple[type[StageParams], ...] = (
    FetchInputsParams,
    SampleCalibrationParams,
    CheckLeaksParams,
    LearnMasksParams,
    ProfileHardwareParams,
    AdaptDimensionsParams,
    UpdateWeightsParams,
    CompactParams,
    FinetuneLoraParams,
    BenchmarkSpeedParams,
    EvalPerplexityParams,
    EvalZeroshotParams,
    QuantizeParams,
    ReportParams,
)


def check_everything(path: Path) -> None:
    """Read every section and compare sections. Raises ParameterError with all problems of all sections, a line each."""
    check_content(read_yaml(path), path)


def check_content(content: dict[str, Any], path: Path) -> None:
    """The same from the content of params.yaml; `path` is for the messages."""
    known = {key for stage in SECTIONS for key in (stage.section, *stage.shared) if "." not in key}
    problems = [
        f"{path}: unknown top-level key {key!r}; known keys are {', '.join(sorted(known))}"
        for key in content
        if key not in known
    ]
    loaded: dict[str, Any] = {}
    for stage in SECTIONS:
        try:
            loaded[stage.section] = stage.of(content, path)
        except ParameterError as error:
            problems.append(str(error))
    texts, sampling, masks = (loaded.get(name) for name in ("fetch_inputs", "sample_calibration", "learn_masks"))
    measured = [loaded[name] for name in ("eval_perplexity", "quantize") if name in loaded]
    measured = [each for each in measured if getattr(each, "enabled", True)]
    problems += _emptied_sources(texts, path.parent) if texts else []
    problems += _unknown_sources(texts, sampling) if texts and sampling else []
    problems += [problem for each in measured for problem in _unknown_texts(texts, each)] if texts else []
    problems += _broken_blocks(masks, sampling) if masks and sampling else []
    profile, adapt = loaded.get("profile_hardware"), loaded.get("adapt_dimensions")
    problems += _steps_between_multiples(profile, adapt) if masks and profile and adapt and masks.latency else []
    problems += _cut_refit(masks, adapt) if masks and adapt else []
    recovery = loaded.get("finetune_lora")
    problems += _zero_norms(recovery, adapt) if recovery and adapt else []
    if problems:
        raise ParameterError("\n".join(dict.fromkeys(problems)))


def _emptied_sources(texts: FetchInputsParams, directory: Path) -> list[str]:
    """DVC empties what a stage writes before the stage runs, so whatever lies there would be lost."""
    written = {(directory / "data" / name).resolve() for name in ("model", "calibration", "heldout", "zeroshot")}
    return [
        f"{texts.section}.{name}.path = {path}: fetch_inputs writes there, and DVC empties it first, so your files "
        "would be lost; move them to another folder"
        for name, path in texts.local_paths().items()
        for where in [(directory / path).resolve()]
        if written & {where, *where.parents}
    ]


def _unknown_sources(texts: FetchInputsParams, sampling: SampleCalibrationParams) -> list[str]:
    labels = [source.label for source in texts.calibration.sources]
    known = f"the sources of fetch_inputs.calibration are {', '.join(labels)}"
    return [
        f"{sampling.section}.{key}: names {', '.join(unknown)}, but {known}; remove it"
        for key, mix in (("mix", sampling.mix), ("finetune_mix", sampling.finetune_mix or {}))
        if (unknown := sorted(set(mix) - set(labels)))
    ] + [
        f"{sampling.section}.{key}: gives every source the weight 0; give one of {', '.join(labels)} more"
        for key, mix in (("mix", sampling.mix), ("finetune_mix", sampling.finetune_mix))
        if mix and all(mix.get(label, 1.0) == 0 for label in labels)
    ]


def _unknown_texts(texts: FetchInputsParams, measured: EvalPerplexityParams | QuantizeParams) -> list[str]:
    labels = [source.label for source in texts.heldout.sources]
    known = f"the sources of fetch_inputs.heldout are {', '.join(labels)}"
    return [
        f"{measured.section}.{key}: names {', '.join(unknown)}, but {known}; remove it"
        for key, windows in (("validation", measured.validation), ("test", measured.test))
        if (unknown := sorted(set(windows) - set(labels)))
    ]


def _broken_blocks(masks: LearnMasksParams, sampling: SampleCalibrationParams) -> list[str]:
    block = masks.used()[masks.section].get("tva", {}).get("curvature_tokens")  # None where it has no influence
    if block is None or sampling.seq_len % block == 0:
        return []
    length = f"{sampling.section}.seq_len = {sampling.seq_len}; use a divisor, or null for whole windows"
    return [f"{masks.section}.tva.curvature_tokens = {block}: does not divide {length}"]


def _steps_between_multiples(profile: ProfileHardwareParams, adapt: AdaptDimensionsParams) -> list[str]:
    """Masks learned for a latency have widths that were timed, so those have to be multiples already."""
    steps = (profile.hidden_step, profile.intermediate_step)
    named = zip(("hidden", "intermediate"), steps, adapt.multiples() or (1, 1), strict=True)
    return [
        f"{profile.section}.{axis}_step = {step}: learn_masks.budget = latency keeps widths that were timed; set it to "
        f"a multiple of {multiple}, adapt_dimensions.multiple, such as {multiple}"
        for axis, step, multiple in named
        if step % multiple
    ]


def _zero_norms(recovery: FinetuneLoraParams, adapt: AdaptDimensionsParams) -> list[str]:
    if not (recovery.enabled and recovery.use_dora and adapt.layout == "padded"):
        return []
    return [
        f"{recovery.section}.use_dora = true with compact.layout = padded: DoRA divides by the norm of a row, and the "
        "rows of the padding are zero; set it to false, or use the layout uneven or uniform"
    ]


def _cut_refit(masks: LearnMasksParams, adapt: AdaptDimensionsParams) -> list[str]:
    """Adaptation drops units that refitted matrices count on."""
    if not METHOD_OPTIONS[masks.method].refits:
        return []
    if adapt.layout == "uniform":
        return [
            f"compact.layout = uniform: {masks.method} refits matrices to the widths that it chooses, which differ by "
            "layer; use uneven or padded"
        ]
    if adapt.multiples() == (1, 1):
        return []
    found = " and ".join(map(str, dict.fromkeys(adapt.multiples() or ["measured"])))
    return [
        f"{adapt.section}.multiple = {found}: {masks.method} refits matrices to the widths that it chooses; set it to 1"
    ]
