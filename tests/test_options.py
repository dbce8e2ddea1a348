"""Tables of options by dotted names: each key is an option of its own."""

from dataclasses import dataclass
from typing import Any

import pytest

from mmrlhf.options import read_options


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        verb: A trainer.
        overrides: Its options.
    """

    verb: str = "train"
    overrides: dict[str, Any] | None = None


def verb(axes: dict[str, list[Any]], train: Training, max_void: dict[str, dict[str, Any]] | None = None) -> None:
    """Do something.

    Args:
        axes: Values by name.
        train: Training.
        max_void: Conditions.
    """


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "verb.yaml"
    path.write_text("axes: {model.beta.w: [0.5], k: [x]}\ntrain: {overrides: {data.shards: here}}\n")
    return lambda *words: read_options(verb, "mmrlhf verb", ["--config", str(path), *words])


@pytest.mark.parametrize(
    "words",
    [["--axes.model.beta.w", "0,0.25,1"], ["--axes.model.beta.w=0,0.25,1"], ["--axes.model.beta.w=[0, 0.25, 1]"]],
)
def test_an_axis_is_given_with_commas_and_takes_the_place_of_the_files(read, words):
    assert read(*words)["axes"] == {"model.beta.w": [0, 0.25, 1], "k": ["x"]}


def test_values_have_the_types_of_yaml(read):
    found = read("--axes.k", "1,1.0,true,null,text,1e-5")["axes"]["k"]
    assert found == [1, 1.0, True, None, "text", 1e-5]
    assert list(map(type, found)) == [int, float, bool, type(None), str, float]


def test_a_new_axis_joins_the_others(read):
    assert list(read("--axes.data.pairs", "all")["axes"]) == ["model.beta.w", "k", "data.pairs"]


def test_of_one_key_given_twice_the_later_wins(read):
    assert read("--axes.k", "1", "--axes.k", "2,3")["axes"]["k"] == [2, 3]


def test_the_key_of_a_nested_table_is_one_key(read):
    words = ["--train.overrides.data.shards", "there", "--train.overrides.a.b=1,2", "--train.verb", "other"]
    assert read(*words)["train"] == Training("other", {"data.shards": "there", "a.b": "1,2"})


def test_a_table_of_tables_takes_a_table(read):
    assert read("--max-void.model.k", "{model.beta.w: 0.0}")["max_void"] == {"model.k": {"model.beta.w": 0.0}}


def test_a_key_without_a_value_does_not_swallow_the_next_option(read):
    with pytest.raises(ValueError, match=r"--axes.model.beta.w: expected a value, got none"):
        read("--axes.model.beta.w", "--train.verb", "other")


def test_what_is_printed_has_the_keys_as_they_were_written(read, capsys):
    with pytest.raises(SystemExit):
        read("--axes.model.beta.w", "1,2", "--print-config")
    printed = capsys.readouterr().out
    assert "  model.beta.w:\n  - 1\n  - 2\n" in printed
    assert "%" not in printed
