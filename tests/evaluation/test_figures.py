"""Figures show the numbers that they are given, and the page shows texts as texts."""

from html.parser import HTMLParser

import numpy as np
import pytest

from mmrlhf.evaluation.figures import calibration, delta_by_gap, in_and_out_of_fold, length_bias, reward_by_rank
from mmrlhf.evaluation.page import Example, Side, critiques_page


def bars(axes):
    """Place, value, low and high of each error bar."""
    found = []
    for container in axes.containers:
        if hasattr(container, "has_yerr"):
            line, _, (*_, segments) = container.lines
            (x, low), (_, high) = segments.get_segments()[0]
            found.append((float(x), float(line.get_ydata()[0]), float(low), float(high)))
    return found


def drawn(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 2000
    return figure.axes[0]


def test_calibration_shows_how_often_a_confidence_is_right(tmp_path):
    """Ten pairs at each of two margins, right as often as they claim and always."""
    low, high = np.log(0.6 / 0.4), np.log(0.9 / 0.1)
    deltas = [low] * 6 + [-low] * 4 + [high] * 10
    axes = drawn(calibration(deltas, bins=2), tmp_path)
    (x, value, *_), (sure, always, least, most) = bars(axes)
    assert (x, value) == (pytest.approx(0.6), pytest.approx(0.6))
    assert (sure, always, most) == (pytest.approx(0.9), 1, 1)
    assert least == pytest.approx(10 / (10 + 1.959964**2))  # Wilson's: ten of ten are no proof
    assert "mean gap to the line 0.050" in axes.get_title(loc="left")


def test_a_margin_of_nothing_counts_half(tmp_path):
    axes = drawn(calibration([0.0, 0.0], bins=1), tmp_path)
    assert bars(axes)[0][:2] == (0.5, 0.5)


def test_intervals_are_over_queries_and_so_wider_where_answers_of_one_agree(tmp_path):
    deltas = [1.0] * 30 + [-1.0] * 10
    queries = [f"q{n // 10}" for n in range(40)]
    [alone], [clustered] = (bars(calibration(deltas, of, bins=1).axes[0]) for of in (None, queries))
    assert alone[1] == clustered[1] == 0.75
    assert clustered[3] - clustered[2] > 1.5 * (alone[3] - alone[2])


def test_each_rank_and_each_gap_has_the_mean_of_its_own(tmp_path):
    rewards, ranks = [3.0, 5.0, 1.0, 2.0, 0.0], [1, 1, 2, 2, 3]
    for figure in (reward_by_rank(rewards, ranks), delta_by_gap(rewards, ranks)):
        axes = drawn(figure, tmp_path)
        assert [value for _, value, *_ in bars(axes)] == [4.0, 1.5, 0.0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1\nn = 2", "2\nn = 2", "3\nn = 1"]


def test_a_liking_for_length_is_told_beside_that_of_people(tmp_path):
    longer = [10, 20, 30, -10]
    axes = drawn(length_bias([1.0, 2.0, 3.0, -1.0], longer), tmp_path)
    told = axes.get_title(loc="left")
    assert "by people in 75%, by the reward in 100%" in told
    assert "length +1.00" in told


def test_pairs_of_one_length_stay_in_one_bin(tmp_path):
    axes = drawn(length_bias([1.0, -1.0, 2.0, -2.0] * 5, [7] * 20), tmp_path)
    assert [bar[:2] for bar in bars(axes)] == [(7, 0)]


def test_what_training_on_a_query_adds_is_told_and_its_pairs_stand_out(tmp_path):
    unseen, queries = np.array([-0.5, -0.1, 0.2, 0.6]), ["a", "b", "c", "d"]
    axes = drawn(in_and_out_of_fold(unseen + 0.25, unseen, queries), tmp_path)
    others, learned = (collection.get_offsets().tolist() for collection in axes.collections[:2])
    assert others == [[-0.5, -0.25], [0.2, pytest.approx(0.45)], [0.6, 0.85]]
    assert learned == [[-0.1, 0.15]]
    told = axes.get_title(loc="left")
    assert "seen: mean δ +0.300, 75.0% right; unseen: +0.050, 50.0%" in told
    assert "seen less unseen: +0.250 (+0.250 to +0.250, 95 % over queries)" in told
    assert axes.get_xlim() == axes.get_ylim() == pytest.approx((-0.85 * 1.06, 0.85 * 1.06))


def test_a_group_of_one_query_is_drawn_without_a_bar():
    axes = reward_by_rank([1.0, 2.0, 3.0], [1, 1, 2], ["a", "a", "b"]).axes[0]
    assert [bar[1:] for bar in bars(axes)] == [(1.5, 1.5, 1.5), (3.0, 3.0, 3.0)]


def test_the_order_of_the_rows_is_not_drawn():
    rng = np.random.default_rng(0)
    deltas, longer = rng.normal(size=60), rng.integers(-90, 90, 60)
    queries = [f"q{n // 3}" for n in range(60)]
    order = rng.permutation(60)
    for draw, columns in (
        (calibration, (deltas,)),
        (reward_by_rank, (deltas, longer % 3)),
        (length_bias, (deltas, longer)),
        (in_and_out_of_fold, (deltas, longer)),
    ):
        one = draw(*columns, queries)
        two = draw(*(column[order] for column in columns), [queries[n] for n in order])
        assert np.allclose(bars(one.axes[0]), bars(two.axes[0]), atol=1e-9)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        calibration([])
    with pytest.raises(ValueError, match="finite"):
        calibration([1.0, float("nan")])
    with pytest.raises(ValueError, match="equally long"):
        length_bias([1.0], [1, 2])


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        """Keep the tag."""
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        """Keep the text."""
        self.texts.append(data)


HOSTILE = '</dd><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)> & "quoted"'


def test_hostile_texts_are_shown_and_not_run():
    sides = [Side(HOSTILE, 1, 2.0, HOSTILE, HOSTILE), Side("", 2, None)]
    page = Page(critiques_page([Example(HOSTILE, HOSTILE, sides, (HOSTILE,), HOSTILE)], HOSTILE))
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert not [pair for pair in page.attributes if pair[1] in ("src", "href") or pair[1].startswith("on")]
    assert page.texts.count(HOSTILE) == 6  # title, heading, prompt, response, critique, reason
    [policy] = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_responses_stand_in_the_order_of_people_and_show_whether_the_reward_agrees():
    sides = [Side("worst", 4, -1.0), Side("middle", 2, 0.6), Side("best", 1, 0.5), Side("tied", 1, 0.7), Side("odd")]
    page = critiques_page([Example("q", "Which?", sides)])
    words = ["best", "tied", "middle", "worst", "odd"]
    assert sorted(words, key=lambda word: page.index(f">{word}<")) == words
    classes = [value for tag, name, value in Page(page).attributes if tag == "article"]
    assert classes == ["differs", "agrees", "differs", "agrees", "unknown"]


def test_equal_rewards_of_different_ranks_do_not_agree_with_people():
    page = critiques_page([Example("q", "Which?", [Side("a", 1, 1.0), Side("b", 2, 1.0)])])
    assert page.count('class="differs"') == 2


def test_pictures_are_inside_the_page_and_nothing_is_fetched():
    example = Example("q", "Which?", [], ("a.png",), why=HOSTILE, pictures=[b"\xff\xd8 one"])
    page = Page(critiques_page([example], told=HOSTILE))
    assert [pair for pair in page.attributes if pair[1] == "src"] == [("img", "src", "data:image/jpeg;base64,/9ggb25l")]
    [policy] = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy.split("; ")[:2] == ["default-src 'none'", "img-src data:"]
    assert not {"script", "link", "a"} & set(page.tags)
    assert [f"q · a.png · {HOSTILE}"] == [text for text in page.texts if text.startswith("q · ")]
    assert [text for text in page.texts if text.startswith("1 queries. Green") and text.endswith(HOSTILE)]
