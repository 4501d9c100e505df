"""What is drawn of a training is what its events say."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.config import LSRConfig
from ragkit.plots import loss_curves
from ragkit.plots.curves import POINTS, Series, envelope, is_noisy, read_curves, smooth, thin
from ragkit.plots.loss import smaller_is_better
from ragkit.runs import Run, RunError


def events(n, loss=lambda i: 3.0 / i, every=0, **metrics):
    out = []
    for i in range(1, n + 1):
        out.append({"step": i, "total": n, "loss": loss(i), "learning_rate": 0.01 * (n - i), "elapsed": 0.1 * i})
        if every and i % every == 0:
            out.append({"step": i, **{f"eval_{name}": f(i) for name, f in metrics.items()}, "eval_runtime": 2.0})
    return out


def lines(plot):
    """gid -> (x, y) of every line with data."""
    found = {}
    for axes in plot.figure.axes:
        for line in axes.get_lines():
            if line.get_gid():
                found[line.get_gid()] = (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()))
    return found


def test_loss_rate_and_evaluations_are_drawn_as_they_were_logged():
    given = events(9, every=3, mrr=lambda i: 0.1 * i if i < 9 else 0.2, loss=lambda i: 3.0 / i)
    drawn = lines(loss_curves(given))
    steps = np.arange(1, 10)
    np.testing.assert_array_equal(drawn["loss-0"], [steps, 3.0 / steps])
    np.testing.assert_allclose(drawn["rate-0"], [steps, 0.01 * (9 - steps)])
    np.testing.assert_allclose(drawn["metric-0-mrr"], [[3, 6, 9], [0.3, 0.6, 0.2]])
    np.testing.assert_allclose(np.ravel(drawn["best-0-mrr"]), [6, 0.6])
    assert "raw-0" not in drawn  # nothing to smooth


def test_words_hold_the_numbers():
    plot = loss_curves(events(9, every=3, mrr=lambda i: 0.1 * i if i < 9 else 0.2), ylabel="KL in nats")
    assert plot.alt == "KL in nats from 3.0 to 0.33 over 9 steps; mrr from 0.30 to 0.20 (best: 0.60)."
    assert plot.figure.axes[0].get_ylabel() == "KL in nats"
    assert [axes.get_xlabel() for axes in plot.figure.axes] == ["", "step", "step"]


def test_a_noisy_loss_has_a_thin_line_and_a_moving_average():
    rng = np.random.default_rng(0)
    noise = rng.random(200)
    drawn = lines(loss_curves(events(200, loss=lambda i: float(noise[i - 1]))))
    np.testing.assert_array_equal(drawn["raw-0"][1], noise)
    expected = [np.average(noise[: i + 1], weights=0.8181818181818181 ** np.arange(i, -1, -1)) for i in range(200)]
    np.testing.assert_allclose(drawn["loss-0"][1], expected)  # span 10: a = 2 / 11


def test_runs_differ_in_more_than_colour_and_have_their_names():
    plot = loss_curves({f"run {i}": events(5, loss=lambda s, i=i: s + i) for i in range(6)})
    axes = plot.figure.axes[0]
    looks = {(str(line._dash_pattern), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"run {i}" for i in range(6)]
    assert plot.alt.startswith("Loss of 6 trainings. run 0: from 1.0 to 5.0 over 5 steps.")


def test_held_out_loss_stands_with_the_loss_and_metrics_can_be_chosen():
    metrics = {name: lambda i: i / 10 for name in ("em", "f1", "recall@1", "mrr", "kl")}
    given = [{**e, "eval_loss": 2.5} if "eval_em" in e else e for e in events(6, every=2, **metrics)]
    plot = loss_curves(given)
    assert {n for n in lines(plot) if n.startswith("metric")} == {f"metric-0-{n}" for n in ("mrr", "recall@1", "f1")}
    assert "Not drawn: em and kl." in plot.alt and "held-out loss from 2.5 to 2.5;" in plot.alt
    assert lines(plot)["eval-loss-0"][0].tolist() == [2, 4, 6]
    assert "metric-0-kl" in lines(loss_curves(given, metric="eval_kl"))
    assert len(loss_curves(given, metric="loss").figure.axes) == 2
    with pytest.raises(ValueError, match="no run has eval_bleu; there are: em, f1"):
        loss_curves(given, metric=["em", "bleu"])


def test_the_best_of_a_loss_is_the_least():
    assert smaller_is_better("loss") and smaller_is_better("val_kl") and smaller_is_better("mean_rank")
    assert not any(smaller_is_better(name) for name in ("mrr", "recall@5", "em", "doc_recall@5"))
    drawn = lines(loss_curves(events(6, every=2, kl=lambda i: [0.3, 0.1, 0.2][i // 2 - 1])))
    np.testing.assert_allclose(np.ravel(drawn["best-0-kl"]), [4, 0.1])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "Loss not logged yet."),
        ([{"step": 0, "eval_mrr": 0.5}], "Loss not logged yet; mrr 0.50."),
        ([{"step": 1, "loss": 2.0, "learning_rate": 1e-3}], "Loss 2.0 at step 1."),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "Loss from 2.0 to 1.0 over 2 steps."),
        ([{"step": 7, "loss": None}], "Loss never finite; not a finite number at 1 step (first: 7)."),
        ([{"step": 1, "loss": 2.0}, {"step": 2, "error": "the loss is nan"}], "Loss 2.0 at step 1."),
        ([{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}], "Loss from 0 to 0 over 2 steps."),
    ],
)
def test_little_or_nothing_to_draw(given, words):
    plot = loss_curves(given)
    assert plot.alt == words
    plot.png(50)
    plot.svg()


def test_losses_that_are_no_numbers_are_marked():
    given = events(8)
    given[3]["loss"], given[4]["loss"], given[5]["loss"] = None, math.nan, math.inf
    plot = loss_curves(given)
    drawn = lines(plot)
    assert drawn["not-finite-0"][0].tolist() == [4, 5, 6] and drawn["loss-0"][0].tolist() == [1, 2, 3, 7, 8]
    assert "not a finite number at 3 steps (first: 4)" in plot.alt


def test_a_resumed_run_is_drawn_once():
    given = [*events(8, loss=lambda i: 9.0), *[{"step": i, "loss": float(i)} for i in range(5, 11)]]
    drawn = lines(loss_curves(given))
    np.testing.assert_array_equal(drawn["raw-0"], [range(1, 11), [9, 9, 9, 9, 5, 6, 7, 8, 9, 10]])


def test_a_run_can_be_a_run_a_folder_a_result_or_events(tmp_path):
    run = Run.create(LSRConfig(), tmp_path, "mine")
    for event in events(4):
        run.log(event)
    run.log({"step": 5, "loss": math.nan})
    result = type("TrainResult", (), {"history": run.events(), "run_dir": run.dir})()
    expected = loss_curves(run).alt
    assert "(first: 5)" in expected
    for source in (run.dir, str(run.dir), result):
        plot = loss_curves(source)
        assert plot.alt == expected and plot.figure.axes[0].get_title(loc="left") == "mine"
    assert loss_curves(tuple(run.events())).alt == expected
    with pytest.raises(RunError, match="no run folder"):
        loss_curves(tmp_path / "other")
    for wrong in (3, ["a"], [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected a"):
            loss_curves({"x": wrong})
    with pytest.raises(ValueError, match="no run"):
        loss_curves({})


def test_a_hundred_thousand_steps_are_few_points():
    rng = np.random.default_rng(0)
    values = 1 + rng.random(100_000)
    values[77_777] = 40.0
    given = [{"step": i + 1, "loss": float(v), "learning_rate": 1e-3} for i, v in enumerate(values)]
    begin = time.process_time()
    plot = loss_curves(given)
    svg = plot.svg()
    assert time.process_time() - begin < 10
    assert all(len(x) <= POINTS for x, _ in lines(plot).values()) and len(svg) < 60_000
    band = next(c for c in plot.figure.axes[0].collections if c.get_gid() == "raw-0")
    assert band.get_datalim(plot.figure.axes[0].transData).y1 == 40.0  # no spike is lost


def test_losses_over_orders_of_magnitude_have_a_log_scale_with_plain_numbers():
    axes = loss_curves(events(9, loss=lambda i: 10.0 ** (2 - i))).figure.axes[0]
    assert axes.get_yscale() == "log" and "log scale" in axes.get_ylabel()
    assert axes.yaxis.get_major_formatter()(100.0, 0) == "100"
    assert loss_curves(events(9)).figure.axes[0].get_yscale() == "linear"


# ---- curves ----


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_smoothing_stays_within_the_values(values, span):
    series = Series(np.arange(len(values)), np.array(values))
    out = smooth(series, span).values
    assert out[0] == pytest.approx(values[0])
    assert (out >= min(values) - 1e-6).all() and (out <= max(values) + 1e-6).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_both_ends_and_the_extremes(values, points):
    series = Series(np.arange(len(values)) * 3, np.array(values))
    out = thin(series, points)
    assert len(out.values) <= max(points, 4)
    assert (np.diff(out.steps) > 0).all() and out.steps[0] == 0 and out.steps[-1] == series.steps[-1]
    assert out.values.min() == min(values) and out.values.max() == max(values)
    np.testing.assert_array_equal(out.values, series.values[out.steps // 3])
    _, low, high = envelope(series, points)
    assert low.min() == min(values) and high.max() == max(values) and (low <= high).all()


def test_what_is_noisy():
    assert not is_noisy(np.linspace(3, 1, 100)) and not is_noisy(np.array([1.0, 2.0, 1.0]))
    assert not is_noisy(np.ones(50)) and is_noisy(np.tile([1.0, 2.0], 20))


def test_events_without_numbers_are_passed_over():
    curves = read_curves(
        [{"loss": 1.0}, {"loss": 2.0}, {"step": 3, "eval_note": "fine", "eval_ok": True, "loss": 1.5}]
    )
    assert curves.loss.steps.tolist() == [1, 2, 3] and not curves.metrics.get("note")


def test_of_many_runs_the_names_stand_below_the_curves():
    runs = {f"_run {i}": [{"step": s, "loss": i + 1 / s, "eval_mrr": 0.1 * s} for s in range(1, 5)] for i in range(9)}
    figure = loss_curves(runs).figure
    assert [text.get_text().strip("\u200b") for text in figure.legends[0].get_texts()] == list(runs)
    main, panel = figure.axes
    assert main.get_legend() is None and [t.get_text() for t in panel.get_legend().get_texts()] == ["best"]
    assert figure.legends[0].get_window_extent().y1 < main.get_window_extent().y0


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    runs = {name: [{"step": s, "loss": 1 / s} for s in range(1, 5)] for name in ("_a", "", "b")}
    texts = loss_curves(runs).figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == ["\u200b_a", "(no name)", "b"]
