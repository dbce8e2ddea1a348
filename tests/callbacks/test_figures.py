"""The bars, points and lines of a figure stand where the numbers are."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from matplotlib.figure import Figure

from mmrlhf.callbacks.figures import Spread, draw_betas

DRAW = np.random.default_rng(0)
MARGINS = np.round(DRAW.normal(0.7, 1.5, 300), 2)
BETAS = 0.1 * (1 + 0.5 * (1 - np.exp(-0.5 * np.maximum(MARGINS, 0))))
COUNTS = DRAW.integers(1, 6, 300)
CATEGORIES = {"VQA": Spread(200, 0.8, 0.12, 0.01), "Safety": Spread(100, nan, 0.13, 0.02)}
RANK_GAPS = {str(gap): Spread(10 * gap, 0.5 * gap, 0.11 + 0.01 * gap, 0.01) for gap in (1, 2, 3)}


def drawn(margins=MARGINS, betas=BETAS, counts=COUNTS, **options):
    known = {"beta0": 0.1, "cap": 0.15, "categories": CATEGORIES, "rank_gaps": RANK_GAPS, "title": "Step 3"}
    figure = draw_betas(margins, betas, counts, **known | options)
    figure.canvas.draw()
    return figure


def bars(axes):
    """Left edge, right edge and height of every bar."""
    return [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_height()) for bar in axes.patches if bar.get_height()]


def words(axes):
    return " ".join(text.get_text() for text in axes.texts)


def test_every_pair_is_in_one_bar_of_each_distribution():
    figure = drawn()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == f"Step 3: {COUNTS.sum():,} pairs"
    for axes in figure.axes[:3]:
        assert sum(height for _, _, height in bars(axes)) == COUNTS.sum()


def test_bars_are_where_their_pairs_are():
    figure = drawn()
    for axes, values in ((figure.axes[0], MARGINS), (figure.axes[1], (BETAS - 0.1) / 0.05), (figure.axes[2], BETAS)):
        for low, high, height in bars(axes):
            most = COUNTS[(values >= low - 1e-9) & (values <= high + 1e-9)].sum()
            least = COUNTS[(values > low + 1e-9) & (values < high - 1e-9)].sum()
            assert least <= height <= most


def test_no_bar_holds_margins_of_both_signs():
    axes = drawn().axes[0]
    assert all(low >= -1e-9 or high <= 1e-9 for low, high, _ in bars(axes))
    negative = sum(height for _, high, height in bars(axes) if high <= 1e-9)
    assert negative == COUNTS[MARGINS < 0].sum()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"negative: {negative / COUNTS.sum():.1%}" in legend
    assert f"median {np.median(np.repeat(MARGINS, COUNTS)):.3g}" in legend


def test_points_and_bounds_are_drawn_where_they_are():
    axes = drawn().axes[3]
    points = np.concatenate([points.get_offsets() for points in axes.collections])
    assert np.array_equal(np.sort(points[:, 0]), np.sort(MARGINS))
    assert dict(points.tolist()) == dict(zip(MARGINS.tolist(), BETAS.tolist(), strict=True))
    assert sorted(line.get_ydata()[0] for line in axes.lines) == [0.1, 0.15]
    low, high = axes.get_ylim()
    assert low < 0.1 < 0.15 < high


@pytest.mark.parametrize(("place", "groups"), [(4, CATEGORIES), (5, RANK_GAPS)])
def test_groups_stand_from_top_to_bottom_with_their_numbers(place, groups):
    axes = drawn().axes[place]
    names = [label.get_text() for label in axes.get_yticklabels()][::-1]
    assert names == [f"{name} ({group.pairs})" for name, group in groups.items()]
    means = axes.lines[0].get_xdata()[::-1]
    assert means.tolist() == [group.mean_beta for group in groups.values()]
    assert words(axes).count("δ") == sum(not np.isnan(group.mean_delta) for group in groups.values())


def test_of_many_groups_those_with_most_pairs_are_shown():
    many = {f"{number:02}": Spread(number, 1.0, 0.12, 0.01) for number in range(30)}
    axes = drawn(categories=many).axes[4]
    shown = [label.get_text()[:2] for label in axes.get_yticklabels()][::-1]
    assert shown == [f"{number:02}" for number in range(18, 30)]
    assert "of 30" in axes.get_title(loc="left")


def test_what_cannot_be_drawn_is_said():
    figure = drawn(np.full(300, nan), np.full(300, 0.1), cap=0.1, categories={})
    told = [words(axes) for axes in figure.axes]
    assert told[:2] == ["no pair has a margin", "β is constant"]
    assert told[3:5] == ["no pair has a margin", "none is told"]
    assert words(drawn(cap=inf).axes[1]) == "β has no bounds to measure by"


@pytest.mark.parametrize("margins", [[0.0], [3.0], [-2.0], [0.0, 0.0]])
def test_a_few_equal_margins_are_drawn(margins):
    margins = np.array(margins)
    figure = drawn(margins, np.full(len(margins), 0.12), np.ones(len(margins), dtype=int))
    assert sum(height for _, _, height in bars(figure.axes[0])) == len(margins)


def test_numbers_of_a_policy_that_diverged_are_left_out():
    figure = drawn(np.array([inf, 1.0, 2.0]), np.array([0.11, nan, 0.12]), np.array([1, 2, 4]))
    assert [height for _, _, height in bars(figure.axes[0])] == [2, 4]
    assert [height for _, _, height in bars(figure.axes[2])] == [1, 4]


def test_a_figure_is_the_same_whatever_other_figures_there_are():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    drawn()
    assert plt.get_fignums() == before


def test_rounding_at_the_bounds_takes_no_pair_out_of_the_gains():
    betas = np.array([np.nextafter(0.1, 0), np.nextafter(0.15, 1)])
    axes = drawn(np.ones(2), betas, np.array([3, 4])).axes[1]
    assert [height for _, _, height in bars(axes)] == [3, 4]
