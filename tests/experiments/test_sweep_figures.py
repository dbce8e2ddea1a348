"""Numbers stand where they belong, every word can be read, and nothing is drawn that was not measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from mmrlhf.experiments.beta_curves import beta_at, draw_beta_curves
from mmrlhf.experiments.choosing import two_axes
from mmrlhf.experiments.costs import draw_cost
from mmrlhf.experiments.curves import draw_differences, draw_training
from mmrlhf.experiments.heatmap import draw_grid
from mmrlhf.experiments.summary import cell_table, items_frame
from mmrlhf.modules.betas import Evidence, RewardMarginBeta

from .swept import BASELINE, BETTER, FAILED, METRIC, STEPS, K, W, histories_of, outcomes_of, sweep, used_of

VALIDATED = ("val/rewards/accuracies", "val/rewards/margins")
EIGHT = tuple(np.arange(1, 9) / 8)
MARGINS = pd.DataFrame({"delta": np.random.default_rng(0).normal(1.1, 1.4, 1000).round(3), "pairs": 1})


def made(**options):
    """Runs, their frame, and the table of their cells."""
    runs = sweep(**{"items": 60} | options)
    used = used_of(runs)
    items = items_frame(used, outcomes_of(runs), METRIC)
    baseline = BASELINE if BASELINE in set(used["cell"]) else None
    return runs, used, cell_table(used, items, METRIC, axes=[W, K], baseline=baseline, resamples=1300)


RUNS, USED, CELLS = made(items=240)
UP, ACROSS = two_axes(USED, [W, K])


def shown(figure):
    figure.canvas.draw()
    return figure


def cell_words(axes, column, row):
    """What is written in one place of the grid."""
    inside = [
        text
        for text in axes.texts
        if column < text.get_position()[0] < column + 1 and row < text.get_position()[1] < row + 1
    ]
    return [text.get_text() for text in sorted(inside, key=lambda text: -text.get_position()[1])]


def boxes(axes, **look):
    """Left and lower edge, width and height of the rectangles that look like this."""
    return [
        (*patch.get_xy(), patch.get_width(), patch.get_height())
        for patch in axes.patches
        if all(getattr(patch, f"get_{name}")() == value for name, value in look.items())
    ]


# The grid -----------------------------------------------------------------------------------------------------


def test_every_cell_stands_at_its_values_with_its_numbers():
    axes = shown(draw_grid(CELLS, UP, ACROSS, metric=METRIC)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.25", "0.5", "1", "2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "0.25", "0.5", "0.75", "1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("k", "w")
    for _, cell in CELLS[CELLS["cell"] != BASELINE].iterrows():
        column, row = [0.25, 0.5, 1, 2].index(cell[K]), [0, 0.25, 0.5, 0.75, 1].index(cell[W])
        mean, span, seeds = cell_words(axes, column, row)
        assert mean == f"{'▲ ' if cell['cell'] == BETTER else ''}{100 * cell['mean']:.1f}"
        assert span == f"{100 * cell['low']:.1f}\N{EN DASH}{100 * cell['high']:.1f}"
        assert seeds == f"sd {100 * cell['sd']:.1f}, n 3"


def test_the_baseline_is_drawn_once_over_all_values_of_the_other_axis():
    axes = shown(draw_grid(CELLS, UP, ACROSS)).axes[0]
    assert (0, 0, 4, 1) in boxes(axes)
    words = [text.get_text() for text in axes.texts if text.get_position()[1] < 1]
    assert words[-1] == "baseline"
    assert len(words) == 4


def test_a_cell_without_a_run_is_said_to_have_no_result():
    axes = shown(draw_grid(CELLS, UP, ACROSS)).axes[0]
    assert cell_words(axes, 3, 4) == ["no result"]
    assert sum(text.get_text() == "no result" for text in axes.texts) == 1


def test_hatched_are_the_cells_that_cannot_be_told_from_the_baseline_and_no_others():
    figure = shown(draw_grid(CELLS, UP, ACROSS))
    hatched = {(int(left), int(low)) for left, low, *_ in boxes(figure.axes[0], hatch="////")}
    every = {(column, row) for column in range(4) for row in range(1, 5)}
    assert hatched == every - {(2, 2), (3, 4)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["not distinguishable from w0"]
    assert "Holm over 15, 5%" in figure.get_supxlabel()


def test_without_tests_nothing_is_hatched_and_nothing_is_claimed():
    bare = cell_table(USED, None, METRIC, axes=[W, K], baseline=BASELINE)
    figure = shown(draw_grid(bare, UP, ACROSS, percent=False))
    assert boxes(figure.axes[0], hatch="////") == []
    assert not figure.legends
    assert "▲" not in figure.get_supxlabel()
    assert "interval" not in figure.get_supxlabel()
    assert cell_words(figure.axes[0], 2, 2)[0] == f"{bare.set_index('cell')['mean'][BETTER]:.3g}"


def test_the_selected_cell_has_a_frame():
    axes = shown(draw_grid(CELLS, UP, ACROSS, selected=BETTER)).axes[0]
    framed = boxes(axes, edgecolor=(0.0, 0.0, 0.0, 1.0))
    assert [(int(left), int(low)) for left, low, *_ in framed] == [(2, 2)]
    assert not boxes(shown(draw_grid(CELLS, UP, ACROSS)).axes[0], edgecolor=(0.0, 0.0, 0.0, 1.0))


def test_colours_of_differences_within_the_noise_are_near_each_other():
    alike = CELLS.assign(mean=0.5 + 1e-3 * np.arange(len(CELLS)), low=0.4, high=0.6)
    mapped = draw_grid(alike, UP, ACROSS).axes[1].get_ylim()
    assert mapped[1] - mapped[0] == pytest.approx(0.2)
    assert mapped[0] < 0.5 < 0.515 < mapped[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ws": (0.5, 1.0), "ks": (0.5, 1.0), "failed": None},
        {"ws": EIGHT, "ks": EIGHT},
        {"ws": EIGHT, "ks": (1.0,)},
        {"ws": (0.5,), "ks": (1.0,), "seeds": (0,), "failed": None},
    ],
)
def test_every_word_of_a_grid_fits_into_its_cell_and_lies_on_no_other(options):
    _, used, cells = made(**options)
    figure = shown(draw_grid(cells, *two_axes(used, [W, K]), selected=BETTER, metric=METRIC))
    axes = figure.axes[0]
    wide = {int(low): box for box in boxes(axes) if box[2] > 1.5 for low in [box[1]]}
    extents = [(text, text.get_window_extent()) for text in axes.texts]
    for text, extent in extents:
        low, high = axes.transData.inverted().transform([extent.min, extent.max])
        row = np.floor(text.get_position()[1])
        left, width = (0, wide[int(row)][2]) if int(row) in wide else (np.floor(text.get_position()[0]), 1)
        assert left + 0.04 < low[0] < high[0] < left + width - 0.04, text.get_text()
        assert row + 0.04 < low[1] < high[1] < row + 0.96, text.get_text()
    for place, (_, one) in enumerate(extents):
        assert not any(one.overlaps(other) for _, other in extents[place + 1 :])


def test_ink_can_be_read_on_every_colour():
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    from mmrlhf.experiments.heatmap import ink_on

    def light(colour):  # relative luminance as the Web Content Accessibility Guidelines define it
        parts = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for share in np.linspace(0, 1, 101):
        fill = colormaps["cividis"](share)
        pair = sorted([light(fill), light(to_rgb(ink_on(fill)))])
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 3.9


def test_one_axis_and_none_are_grids_too():
    _, used, cells = made(ws=(0.5, 1.0), ks=(1.0,), failed=None)
    up, across = two_axes(used, [W, K])
    axes = shown(draw_grid(cells, up, across)).axes[0]
    assert (up, across) == (None, W)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1"]
    alone = cells[cells["cell"] == BASELINE]
    assert len(shown(draw_grid(alone, None, None)).axes[0].texts) == 4


def test_a_cell_with_a_value_of_neither_axis_has_a_row_of_its_own():
    other = CELLS.iloc[[1]].assign(**{"cell": "base", W: np.nan, K: np.nan, "mean": 0.123, "low": 0.1, "high": 0.2})
    axes = shown(draw_grid(pd.concat([CELLS, other], ignore_index=True), UP, ACROSS)).axes[0]
    assert (0, -1, 4, 1) in boxes(axes)
    assert "12.3" in [text.get_text() for text in axes.texts if text.get_position()[1] < 0]


# β over δ -----------------------------------------------------------------------------------------------------


def rules(**options):
    used = made(**options)[1] if options else USED
    return used[["cell", "rule.beta0", "rule.w", "rule.k"]].rename(columns=lambda name: name.removeprefix("rule."))


def test_beta_is_that_of_the_training():
    margins = torch.linspace(-3, 8, 50)
    none = torch.zeros(50)
    known = RewardMarginBeta(beta0=0.2, w=0.7, k=1.3)(Evidence(margins, none, none, none[0], none[:0]))
    assert beta_at(margins.numpy(), 0.2, 0.7, 1.3) == pytest.approx(known.numpy(), rel=1e-6)


def test_every_cell_has_a_curve_over_all_margins_that_were_measured():
    figure = shown(draw_beta_curves(rules(), MARGINS))
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [f"w = {w:g}" for w in (0.25, 0.5, 0.75, 1.0)]
    for axes, w in zip(panels, (0.25, 0.5, 0.75, 1.0), strict=True):
        curves = {line.get_label(): line for line in axes.lines}
        strengths = [0.25, 0.5, 1.0, 2.0] if w < 1 else [0.25, 0.5, 1.0]  # the failed cell has none
        assert sorted(curves) == sorted(["β₀ = 0.1", *(f"k = {k:g}" for k in strengths)])
        for k in strengths:
            across, up = curves[f"k = {k:g}"].get_data()
            assert up == pytest.approx(0.1 * (1 + w * (1 - np.exp(-k * np.maximum(across, 0)))))
            assert across[0] < 0 < MARGINS["delta"].quantile(0.99) < across[-1]


def test_behind_the_curves_are_the_pairs_and_no_bar_holds_margins_of_both_signs():
    figure = shown(draw_beta_curves(rules(), MARGINS.assign(pairs=3)))
    behind = [axes for axes in figure.axes if axes.patches]
    assert len(behind) == 4
    for axes in behind:
        bars = [
            (bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches if bar.get_height()
        ]
        assert all(low >= -1e-9 or high <= 1e-9 for low, high, _ in bars)
        negative = sum(height for _, high, height in bars if high <= 1e-9)
        low, high = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
        inside = MARGINS["delta"].between(low, high)
        assert sum(height for *_, height in bars) == 3 * inside.sum() >= 3 * 0.98 * len(MARGINS)
        assert negative == 3 * (inside & (MARGINS["delta"] < 0)).sum()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "3,000 pairs by δ" in words
    assert f"δ < 0: {(MARGINS['delta'] < 0).mean():.1%}" in words


def test_without_margins_or_without_a_rule_nothing_is_made_up():
    figure = shown(draw_beta_curves(rules(), MARGINS.iloc[:0]))
    assert not any(axes.patches for axes in figure.axes)
    assert not any("δ" in text.get_text() for text in figure.legends[0].get_texts())
    none = shown(draw_beta_curves(rules().assign(w=np.nan), MARGINS))
    assert "no cell has a β that follows the margin" in [text.get_text() for text in none.axes[0].texts]
    alone = shown(draw_beta_curves(rules().query("cell == 'w0'"), MARGINS))
    assert [line.get_label() for line in alone.axes[0].lines] == ["β₀ = 0.1"]


# Training, cost, differences ----------------------------------------------------------------------------------


def training(histories=None, used=USED, **options):
    found = histories_of(RUNS) if histories is None else histories
    up, across = two_axes(used, [W, K])
    return shown(draw_training(found, used, up, across, metrics=VALIDATED, baseline=BASELINE, **options))


def test_lines_are_means_over_seeds_and_bands_reach_from_the_lowest_to_the_highest():
    figure = training()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes[4:]}  # the second row: margins
    axes = panels["w = 0.5"]
    lines = {line.get_label(): line for line in axes.lines}
    assert sorted(lines) == ["k = 0.25", "k = 0.5", "k = 1", "k = 2", BASELINE]
    for label, cell in (("k = 1", BETTER), (BASELINE, BASELINE)):
        values = np.array([[v for _, v in run.histories[VALIDATED[1]]] for run in RUNS if run.cell == cell])
        assert lines[label].get_xdata().tolist() == list(STEPS)
        assert lines[label].get_ydata() == pytest.approx(values.mean(0))
        band = axes.collections[list(lines).index(label)].get_paths()[0].vertices
        for place, step in enumerate(STEPS):
            heights = band[band[:, 0] == step][:, 1]
            assert (heights.min(), heights.max()) == pytest.approx((values[:, place].min(), values[:, place].max()))


def test_a_step_that_a_seed_lacks_is_left_out_of_the_mean():
    found = histories_of(RUNS)
    found = found[~((found["run"] == f"{BETTER}-seed1") & (found["step"] == 30))]
    axes = next(axes for axes in training(found).axes[4:] if axes.get_title(loc="left") == "w = 0.5")
    line = next(line for line in axes.lines if line.get_label() == "k = 1")
    assert line.get_xdata().tolist() == [step for step in STEPS if step != 30]


def test_one_seed_has_no_band_and_a_metric_that_was_not_logged_is_said_so():
    alone = training(used=USED[USED["seed"] == 0])
    assert not any(axes.collections for axes in alone.axes)
    found = histories_of(RUNS).query("metric == 'val/rewards/margins'")
    words = [[text.get_text() for text in axes.texts] for axes in training(found).axes]
    assert words == [["not logged"]] * 4 + [[]] * 4


def test_no_panel_is_narrow_however_many_values_there_are():
    runs, used, _ = made(ws=EIGHT, ks=EIGHT, seeds=(0,), items=4)
    figure = training(histories_of(runs), used)
    seen = [axes for axes in figure.axes if axes.get_visible()]
    assert len(seen) == 16
    assert min(axes.get_window_extent().width / figure.dpi for axes in seen) > 2
    assert len(figure.legends[0].get_texts()) == 9


def test_marks_stand_at_cost_and_result_and_equal_costs_are_said_to_be_equal():
    figure = shown(draw_cost(CELLS, USED, UP, ACROSS, metric=METRIC, selected=BETTER))
    left, right = figure.axes
    marks = [line.get_data() for line in left.lines if line.get_markersize() == 8]
    points = sorted((float(x[0]), float(y[0])) for x, y in marks)
    known = sorted(zip(CELLS["ledger/device_seconds"], 100 * CELLS["mean"], strict=True))
    assert np.array(points) == pytest.approx(np.array(known))
    dots = [point for line in left.lines if line.get_marker() == "." for point in zip(*line.get_data(), strict=True)]
    assert len(dots) == len(USED)
    assert [text.get_text() for text in right.texts] == ["the same for every cell: 3.1e+12"]
    assert left.get_yticklabels()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [
        *(f"w = {w:g}" for w in (0.25, 0.5, 0.75, 1)),
        *(f"k = {k:g}" for k in (0.25, 0.5, 1, 2)),
        "w0 (baseline)",
        f"selected: {BETTER}",
    ]


def test_costs_that_nobody_logged_are_not_drawn():
    bare = CELLS.assign(**{"ledger/flops": np.nan, "ledger/device_seconds": np.nan})
    figure = shown(draw_cost(bare, USED, UP, ACROSS, metric=METRIC))
    assert [axes.texts[0].get_text() for axes in figure.axes] == [
        "no run has ledger/device_seconds",
        "no run has ledger/flops",
    ]


def test_differences_are_filled_where_a_test_tells_them_apart():
    figure = shown(draw_differences(CELLS, metric=METRIC))
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()][::-1]
    assert names == CELLS.loc[CELLS["p"].notna(), "cell"].tolist()
    points = [line for line in axes.lines if line.get_marker() == "o"][::-1]
    filled = [name for name, line in zip(names, points, strict=True) if line.get_markerfacecolor() != "white"]
    assert filled == [BETTER]
    assert [line.get_xdata()[0] for line in points] == pytest.approx((100 * CELLS["difference"].dropna()).tolist())
    assert [text.get_text() for text in axes.texts].count("3 of 3") == (CELLS["seeds_better"] == 3).sum()


def test_no_figure_is_left_in_pyplot_and_no_frame_is_changed():
    import matplotlib.pyplot as plt

    before, cells, used = plt.get_fignums(), CELLS.copy(), USED.copy()
    draw_grid(CELLS, UP, ACROSS)
    draw_cost(CELLS, USED, UP, ACROSS, metric=METRIC)
    draw_differences(CELLS)
    training()
    assert plt.get_fignums() == before
    pd.testing.assert_frame_equal(CELLS, cells)
    pd.testing.assert_frame_equal(USED, used)
    assert FAILED not in set(CELLS["cell"])
