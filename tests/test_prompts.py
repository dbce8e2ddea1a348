"""Templates are data: found by name or path, filled in one pass, known by their digest."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.prompts import Template, critique_prompt, enhance_prompt, load_template

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(TEXT, TEXT)
def test_what_is_filled_in_stands_there_unchanged_whatever_it_contains(question, response):
    template = load_template("critique")
    before, between, after = (
        template.text.partition("{question}")[0],
        template.text.partition("{question}")[2].partition("{response}")[0],
        template.text.partition("{response}")[2],
    )
    assert critique_prompt(template, question, response) == before + question + between + response + after


def test_a_field_inside_a_value_is_not_filled():
    assert critique_prompt(load_template("critique"), "{response}", "secret").count("secret") == 1


@given(TEXT, TEXT, TEXT)
def test_material_for_an_enhancer_is_quoted_and_can_be_read_back(question, response, reason):
    template = Template("t", "{question}\n{response}\n{reason}")
    lines = enhance_prompt(template, question, response, reason).split("\n")
    assert [json.loads(line) for line in lines] == [question, response, reason]


def test_a_template_of_ones_own_takes_the_place_of_ours_and_has_another_digest(tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text("Judge {response} to {question}.\n")
    template = load_template(own)
    assert critique_prompt(template, "q", "r") == "Judge r to q."
    assert template.digest == hashlib.sha256(b"Judge {response} to {question}.").hexdigest()
    assert template.digest != load_template("critique").digest


def test_a_template_without_the_right_fields_is_refused(tmp_path):
    own = tmp_path / "mine.txt"
    own.write_text("Judge {answer}")
    with pytest.raises(ValueError, match=r"expected the fields \['question', 'response'\], the file has \['answer'\]"):
        critique_prompt(load_template(own), "q", "r")


def test_an_unknown_template_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match="'critic': expected one of critique, enhance, judge_pairwise, judge_pointwise, or"
    ):
        load_template("critic")
