"""The pictures are drawn from the files that the pipeline writes."""

from pathlib import Path

import pytest

from tools import figures


def experiment(name: str, sparsity: float, ppl: float, speedup: float, finetuned: float | None = None) -> dict:
    speed = {
        phase: {"dense": {"latency_ms": 60.0}, "compact": {"latency_ms": 60.0 / speedup}, "speedup": speedup}
        for phase in figures.PHASES
    }
    perplexity = {"dense": {"ppl": 20.0}, "compact": {"ppl": ppl}}
    if finetuned is not None:
        perplexity["finetuned"] = {"ppl": finetuned}
    metrics = {
        "metrics/perplexity.json": {"data": perplexity},
        "metrics/masks.json": {"data": {"seconds": 10.0}},
        "metrics/speed.json": {"data": speed},
    }
    params = {"params.yaml": {"data": {"sparsity": sparsity, "learn_masks": {"method": name, "axes": ["hidden"]}}}}
    return {"rev": name * 3, "name": name, "data": {"metrics": metrics, "params": params}}


SHOWN = [
    {
        **experiment("tva", 0.2, 30.0, 1.2, finetuned=25.0),
        "experiments": [{"revs": [experiment("flap", 0.5, 90.0, 1.5)]}],
    },
    {"rev": "empty", "data": None},
    experiment("tva", 0.2, 30.0, 1.2, finetuned=25.0),
]


def test_points_are_the_experiments_own_figures_once() -> None:
    found = figures.points(SHOWN)
    assert [(point.name, point.sparsity, point.perplexity) for point in found] == [
        ("tva", 0.2, 25.0),
        ("flap", 0.5, 90.0),
    ]
    assert found[1].latency_ms["decode"] == pytest.approx(40.0)
    without_speed = experiment("tva", 0.2, 30.0, 1.2)
    del without_speed["data"]["metrics"]["metrics/speed.json"]
    assert figures.points([without_speed]) == []


def test_the_front_holds_those_that_nothing_beats() -> None:
    assert figures.pareto([(3.0, 10.0), (1.0, 30.0), (2.0, 40.0), (2.5, 20.0), (4.0, 10.0)]) == [
        (1.0, 30.0),
        (2.5, 20.0),
        (3.0, 10.0),
    ]


PROFILE = "intermediate,prefill_ms,prefill_iqr_ms,decode_ms,decode_iqr_ms\n32,1.0,0.1,0.2,0.0\n64,1.9,0.1,0.3,0.01\n"
SPEED = "repeat,batch,phase,model,latency_ms,machine\n" + "".join(
    f"{repeat},1,{phase},{model},{60 + repeat},cpu\n"
    for phase in figures.PHASES
    for model in ("dense", "compact")
    for repeat in range(3)
)


def test_every_picture_is_drawn_and_absent_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures.main(metrics=tmp_path, out=tmp_path / "figures")
    assert "latency_by_width: left out" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()
    (tmp_path / "profile.csv").write_text(PROFILE)
    (tmp_path / "speed.csv").write_text(SPEED)
    figures.main(metrics=tmp_path, out=tmp_path / "figures")
    figures.draw(tmp_path / "figures", "speedups", figures.speedups, figures.points(SHOWN))
    figures.draw(tmp_path / "figures", "qualities", figures.qualities, figures.points(SHOWN))
    for name in ("latency_by_width", "rounds", "speedups", "qualities"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "</svg>" in (tmp_path / "figures" / f"{name}.svg").read_text()
