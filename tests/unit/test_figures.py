"""The pictures are drawn from the files that the pipeline writes."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tools import figures


def experiment(name: str, sparsity: float, ppl: float, speedup: float, finetuned: float | None = None) -> dict:
    speed = {
        phase: {"dense": {"latency_ms": 60.0}, "compact": {"latency_ms": 60.0 / speedup}, "speedup": speedup}
        for phase in figures.PHASES
    }
    by_model = {"dense": 20.0, "compact": ppl, "finetuned": finetuned}
    perplexity = {name: {"validation": {"wiki": {"ppl": one}}} for name, one in by_model.items() if one is not None}
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
    assert found[1].latency_ms("decode") == pytest.approx(40.0)
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


def lines(figure: Figure) -> list[dict[str, list[tuple[float, float]]]]:
    """By panel, the points of each labelled line."""
    return [
        {str(line.get_label()): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.get_lines()}
        for axes in figure.axes
    ]


def test_every_measured_round_and_width_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "profile.csv").write_text(PROFILE)
    (tmp_path / "speed.csv").write_text(SPEED)
    drawn = figures.draw(tmp_path, "rounds", figures.rounds, figures.read_rows(tmp_path / "speed.csv"))
    assert [axes.get_title() for axes in drawn.axes] == ["prefill", "decode"]
    own = {"dense": [(0.0, 60.0), (1.0, 61.0), (2.0, 62.0)], "compact": [(0.0, 60.0), (1.0, 61.0), (2.0, 62.0)]}
    assert lines(drawn) == [own, own]
    drawn = figures.draw(tmp_path, "widths", figures.staircase, figures.read_rows(tmp_path / "profile.csv"))
    prefill, decode = (next(iter(panel.values())) for panel in lines(drawn))
    assert prefill == [(32.0, 1.0), (64.0, 1.9)]
    assert decode == [(32.0, 0.2), (64.0, 0.3)]


def test_every_experiment_is_drawn_under_its_method(tmp_path: Path) -> None:
    measured = figures.points(SHOWN)
    for panel in lines(figures.draw(tmp_path, "speedups", figures.speedups, measured)):
        assert (panel["tva"], panel["flap"]) == ([(0.2, 1.2)], [(0.5, 1.5)])
    drawn = figures.draw(tmp_path, "qualities", figures.qualities, measured)
    assert all(axes.get_yscale() == "log" for axes in drawn.axes)
    for panel in lines(drawn):
        assert panel["dense"] == [(60.0, 20.0)]
        assert (panel["tva"], panel["flap"]) == ([(50.0, 25.0)], [(40.0, 90.0)])
        assert panel["best so far"] == [(40.0, 90.0), (50.0, 25.0), (60.0, 20.0)]


def test_pictures_are_files_and_those_without_data_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures.main(metrics=tmp_path, out=tmp_path / "figures")
    assert "latency_by_width: left out" in capsys.readouterr().out
    assert not (tmp_path / "figures").exists()
    (tmp_path / "profile.csv").write_text(PROFILE)
    figures.main(metrics=tmp_path, out=tmp_path / "figures")
    assert "rounds: left out" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "latency_by_width.png",
        "latency_by_width.svg",
    ]
    assert (tmp_path / "figures/latency_by_width.png").read_bytes().startswith(b"\x89PNG")
    assert "intermediate width" in (tmp_path / "figures/latency_by_width.svg").read_text()
