"""Every family's prompts are its processor's own, and batches of them are computed as each row alone."""

import inspect

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmrlhf.batches import IGNORED, PADDING
from mmrlhf.datamodules.rows import Answers

from ..datamodules.made import opened, picture, sample
from ..threads import one_thread  # noqa: F401 - of itself, for the whole module
from .families import BUILD, SUPPORTS, TIED, built, saved
from .queries import FILM, FRAMES, batch, samples

ALL = [(family, kind) for family, kinds in SUPPORTS.items() for kind in kinds]
FRAMES_ARE_PICTURES = ("internvl", "smolvlm")
"""Families whose films have the same placeholders and features as pictures."""


def ordinary(processor, case, answer=None):
    """The conversation as the family's documentation encodes it: ids, features and what is told of the tokens."""
    query = case.ranked.query
    content, at = [], 0
    for medium, stored in zip(query.media, case.media, strict=True):
        content += [{"type": "text", "text": query.prompt[at : medium.offset]}] if medium.offset > at else []
        shown = [opened(data) for data in stored]
        film = np.stack([np.asarray(frame) for frame in shown])
        content.append({"type": "image", "image": shown[0]} if len(shown) == 1 else {"type": "video", "video": film})
        at = medium.offset
    content.append({"type": "text", "text": query.prompt[at:]})
    turns = [("system", query.system)] if query.system else []
    turns += [(turn.role, turn.text) for turn in query.history]
    talk = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    talk.append({"role": "user", "content": content})
    if answer is not None:
        talk.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    has_film = any(medium.kind == "video" for medium in query.media)
    out = processor.apply_chat_template(
        [talk],
        add_generation_prompt=answer is None,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_sample_frames": False} if has_film else {},
    )
    ids = out.pop("input_ids")
    del out["attention_mask"]
    per_token = {name: out.pop(name)[0] for name in ("mm_token_type_ids", "token_type_ids") if name in out}
    return ids[0], dict(out), per_token


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# Checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILD)
def test_a_checkpoint_is_small_of_its_family_and_comes_back_from_its_folder(family, tmp_path):
    model, processor = built(family)
    assert model.config.model_type == family
    assert 60_000 < model.num_parameters() < 150_000
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (family in TIED)
    text = model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    offline = {"local_files_only": True, "trust_remote_code": False}
    again = AutoModelForImageTextToText.from_pretrained(saved(family, tmp_path), **offline)
    assert type(again) is type(model)
    assert same(again.state_dict(), model.state_dict())
    assert type(loaded := AutoProcessor.from_pretrained(tmp_path, **offline)) is type(processor)
    case = samples(["image"])[0]
    assert Answers(loaded, FRAMES)(case).prefix.equal(Answers(processor, FRAMES)(case).prefix)
    assert same(Answers(loaded, FRAMES)(case).features, Answers(processor, FRAMES)(case).features)


@pytest.mark.parametrize("family", BUILD)
def test_a_checkpoint_is_made_the_same_again_and_leaves_chance_alone(family):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model, _ = BUILD[family]()
    assert torch.equal(torch.rand(3), expected)
    assert same(model.state_dict(), built(family)[0].state_dict())


def answer_logps(model, ids, told, features, per_token):
    """The log-probs of all tokens at the places where the answer is said."""
    whole = torch.cat([ids, told])[None]
    types = {name: torch.cat([value, torch.zeros_like(told)])[None] for name, value in per_token.items()}
    with torch.no_grad():
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **features, **types).logits[0]
    return logits[len(ids) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kind in ALL if kind != "text"])
def test_log_probs_depend_on_every_picture_and_on_the_prompt(family, kind):
    model, processor = built(family)
    case = samples([kind])[0]
    ids, features, per_token = ordinary(processor, case)
    told = Answers(processor, FRAMES)(case).continuations[0].supervised
    seen = answer_logps(model, ids, told, features, per_token)
    for place, stored in enumerate(case.media):
        for frame in range(len(stored)):
            width, height = opened(stored[frame]).size
            other = [*stored[:frame], picture(77, (width, height)), *stored[frame + 1 :]]
            changed = case._replace(media=(*case.media[:place], tuple(other), *case.media[place + 1 :]))
            unlike = answer_logps(model, ids, told, ordinary(processor, changed)[1], per_token)
            assert (unlike - seen).abs().max() > 0.02
    asked = ids.clone()
    asked[-6] = processor.tokenizer.convert_tokens_to_ids("z")
    assert (answer_logps(model, asked, told, features, per_token) - seen).abs().max() > 0.1


# Encoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_a_prompt_is_what_the_processor_makes_of_the_conversation(family, kind):
    processor = built(family)[1]
    for case in samples([kind]):
        made = Answers(processor, FRAMES)(case)
        ids, features, per_token = ordinary(processor, case)
        assert made.prefix.tolist() == ids.tolist()
        assert same(made.features, features)
        assert same(made.per_token, per_token)


@pytest.mark.parametrize(("family", "kind"), [pair for pair in ALL if pair != ("smolvlm", "film")])
def test_prompt_and_response_are_the_beginning_of_the_whole_conversation(family, kind):
    """Not where transformers puts SmolVLM's own template for films in: it has a space before what is said."""
    processor = built(family)[1]
    for case in samples([kind]):
        made = Answers(processor, FRAMES)(case)
        for told, response in zip(made.continuations, case.ranked.responses, strict=True):
            whole, _, types = ordinary(processor, case, response.text)
            said = torch.cat([made.prefix, told.supervised])
            assert said.tolist() == whole[: len(said)].tolist()
            assert processor.tokenizer.decode(whole[len(said) :]) == "\n"
            for name, value in made.per_token.items():
                assert value.equal(types[name][: len(value)])
                assert not types[name][len(value) :].any()


@pytest.mark.parametrize(("family", "kind"), ALL)
def test_there_is_a_placeholder_for_every_vector_that_the_model_makes_of_the_media(family, kind):
    model, processor = built(family)
    for case in samples([kind]):
        made = Answers(processor, FRAMES)(case)
        films = kind == "film" and family not in FRAMES_ARE_PICTURES
        token = model.config.video_token_id if films else model.config.image_token_id
        count = int((made.prefix == token).sum())
        if kind == "text":
            assert count == 0
            assert not made.features
            continue
        encode = model.get_video_features if films else model.get_image_features
        known = inspect.signature(encode).parameters
        with torch.no_grad():
            made_of = encode(**{name: value for name, value in made.features.items() if name in known}).pooler_output
        vectors = sum(part.shape[:-1].numel() for part in made_of)
        assert count == vectors >= len(case.media) * 4


@pytest.mark.parametrize("family", [family for family, kinds in SUPPORTS.items() if "film" not in kinds])
def test_a_film_is_refused_by_families_that_take_none(family):
    processor = built(family)[1]
    with pytest.raises(ValueError, match=r"Processor: expected .*, got 1 film; give the frames as images or"):
        Answers(processor, FRAMES)(samples(["film"])[0])


MIXED = sample("mixed", [FILM, [picture(1)]], offsets=[0, 8], prompt="Compare both of them.")


def test_a_picture_beside_a_film_is_refused_where_one_would_take_the_place_of_the_other():
    processor = built("smolvlm")[1]
    with pytest.raises(ValueError, match="SmolVLMProcessor: expected images or films in one prompt, got both"):
        Answers(processor, FRAMES)(MIXED)
    assert len(ordinary(processor, MIXED)[1]["pixel_values"][0]) == FRAMES  # the negative control: no picture is left


@pytest.mark.parametrize("family", [name for name, kinds in SUPPORTS.items() if "film" in kinds and name != "smolvlm"])
def test_a_picture_beside_a_film_is_what_the_processor_makes_of_both(family):
    made = Answers(built(family)[1], FRAMES)(MIXED)
    ids, features, per_token = ordinary(built(family)[1], MIXED)
    assert made.prefix.tolist() == ids.tolist()
    assert same(made.features, features)
    assert same(made.per_token, per_token)


# Batches ----------------------------------------------------------------------------------------------------


def rows_together(model, made):
    """The log-probs at the supervised tokens of every row of a batch, by the model's own forward."""
    rows = made.rows
    mask = (rows.segment_ids != PADDING).long()
    with torch.no_grad():
        logits = model(input_ids=rows.input_ids, attention_mask=mask, **rows.features, **rows.per_token).logits
    return [logits[row, rows.previous[row][rows.labels[row] != IGNORED]].log_softmax(-1) for row in range(len(logits))]


@pytest.mark.parametrize("family", BUILD)
def test_a_batch_of_all_kinds_is_computed_as_every_conversation_alone(family):
    model, processor = built(family)
    cases = samples(SUPPORTS[family])
    cases += [MIXED] if "film" in SUPPORTS[family] and family != "smolvlm" else []
    for order in (cases, cases[::-1]):
        found = iter(rows_together(model, batch(processor, order, "rows")))
        for case in order:
            ids, features, per_token = ordinary(processor, case)
            for told in Answers(processor, FRAMES)(case).continuations:
                alone = answer_logps(model, ids, told.supervised, features, per_token)
                assert torch.allclose(next(found), alone, atol=1e-4)
        assert next(found, None) is None
