"""The grid: every combination once, under a name that says what it is and that stays."""

import itertools
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.experiments.grid import grid, option, short_names, text_of

WK = {"model.beta.w": [0.0, 0.25, 0.5, 1.0], "model.beta.k": [0.25, 0.5, 1.0, 2.0]}
VOID = {"model.beta.k": {"model.beta.w": 0.0}}
values = st.one_of(
    st.integers(-50, 50),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(max_size=60),
)


def names(cells):
    return [cell.name for cell in cells]


def test_every_combination_is_there_once_with_every_seed():
    cells = grid(WK, {}, [0, 1, 2])
    found = sorted((cell.overrides["model.beta.w"], cell.overrides["model.beta.k"], cell.seed) for cell in cells)
    assert found == sorted(itertools.product(*WK.values(), [0, 1, 2]))
    assert len(set(names(cells))) == 48
    assert "w0.25-k1-seed0" in names(cells)


def test_cells_in_which_an_axis_is_void_are_one_and_do_not_name_it():
    cells = grid(WK, VOID, [5])
    assert len(cells) == 1 + 3 * 4
    [baseline] = [cell for cell in cells if cell.overrides["model.beta.w"] == 0]
    assert baseline.overrides == {"model.beta.w": 0.0}
    assert baseline.name == "w0-seed5"


def test_a_condition_on_several_axes_holds_where_all_of_them_hold():
    axes = {"a": [0, 1], "b": [0, 1], "c": [7, 8]}
    said = {tuple(cell.overrides) for cell in grid(axes, {"c": {"a": 0, "b": 0}}, [0])}
    assert said == {("a", "b"), ("a", "b", "c")}
    assert len(grid(axes, {"c": {"a": 0, "b": 0}}, [0])) == 1 + 3 * 2


def test_all_combinations_of_the_first_seed_come_before_the_second():
    assert [cell.seed for cell in grid(WK, VOID, [3, 1])] == [3] * 13 + [1] * 13


@given(st.lists(values, min_size=1, max_size=6, unique_by=lambda value: text_of(value).casefold()), st.data())
def test_names_stay_when_an_axis_or_the_seeds_grow(given_values, data):
    some = data.draw(st.lists(st.sampled_from(given_values), min_size=1, unique_by=lambda value: text_of(value)))
    small = grid({"a.x": some, "a.y": [1, 2]}, {}, [0])
    large = {cell.name: cell for cell in grid({"a.x": given_values, "a.y": [2, 1, 3]}, {}, [4, 0])}
    assert all(large[cell.name] == cell for cell in small)


@given(st.lists(values, min_size=1, max_size=6))
def test_a_name_can_be_a_folder_and_no_two_cells_share_one(given_values):
    try:
        cells = grid({"x": given_values}, {}, [0])
    except ValueError:
        assert len({text_of(value).casefold() for value in given_values}) < len(given_values)
        return
    assert len({name.casefold() for name in names(cells)}) == len(given_values)
    assert all(re.fullmatch(r"x[A-Za-z0-9_.+-]+-seed0", name) and len(name) < 80 for name in names(cells))


@pytest.mark.parametrize("twice", [[1, 1.0], ["1", 1], [True, "true"], ["A", "a"], [0.5, "0.5"], [None, "null"]])
def test_values_that_a_command_line_or_a_disk_takes_for_one_are_refused(twice):
    with pytest.raises(ValueError, match=r"axes.x: expected values that differ"):
        grid({"x": twice}, {}, [0])


def test_what_joins_two_parts_of_a_name_is_not_left_in_one():
    assert len(grid({"a": ["1", "1-b2"], "b": [2]}, {}, [0])) == 2


def test_two_combinations_of_one_name_are_refused():
    # Where s is 0 the cell is that of r = 24, where s is 1 that of r2 = 4.
    with pytest.raises(ValueError, match=r"expected a name for each cell, got 'r24'"):
        grid({"r": [24], "r2": [4], "s": [0, 1]}, {"r2": {"s": 0}, "r": {"s": 1}, "s": {"r": 24}}, [0])


def test_types_are_kept():
    cells = grid({"limit": [1], "rate": [1.0], "name": ["1.0"]}, {}, [0])
    assert [type(value) for value in cells[0].overrides.values()] == [int, float, str]
    assert [option("limit", 1), option("limit", 1.0)] == ["--limit=1", "--limit=1.0"]


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none()))
def test_the_word_of_a_value_is_read_as_the_same_value(value):
    word = option("a.b", value).removeprefix("--a.b=")
    read = yaml.safe_load(word)
    read = float(read) if isinstance(value, float) else read  # YAML 1.1 wants a dot in 1e-05; the parser does not
    assert (read, type(read)) == (value, type(value))


def test_a_short_name_is_as_long_as_it_must_be():
    axes = {name: [] for name in ("w", "model.w", "model.beta.k", "model.loss.k", "data.pairs")}
    assert list(short_names(axes).values()) == ["w", "model.w", "beta.k", "loss.k", "pairs"]


@pytest.mark.parametrize(
    ("axes", "void", "seeds", "message"),
    [
        ({"x": []}, {}, [0], "axes.x: expected one value or more"),
        ({"x y": [1]}, {}, [0], "axes: expected dotted names"),
        ({"x": [1]}, {"y": {"x": 1}}, [0], "void: expected names of axes, got 'y'"),
        ({"x": [1]}, {"x": {"z": 1}}, [0], "void: expected names of axes, got 'z'"),
        ({"x": [1]}, {"x": {"x": 1}}, [0], "void.x: expected values of other axes"),
        ({"x": [1]}, {"x": {}}, [0], "void.x: expected values of other axes"),
        ({"x": [1]}, {}, [], "seeds: expected one or more"),
        ({"x": [1]}, {}, [1, 1], "seeds: expected values that differ"),
        ({"x": [math.inf]}, {}, [0], "finite|plain values"),
    ],
)
def test_what_makes_no_grid_is_refused(axes, void, seeds, message):
    with pytest.raises(ValueError, match=message):
        grid(axes, void, seeds)


def test_without_axes_there_is_one_cell_for_each_seed():
    assert names(grid({}, {}, [0, 1])) == ["base-seed0", "base-seed1"]
