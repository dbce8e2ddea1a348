"""A fingerprint changes with everything a file was made from, and with nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrlhf.fingerprint import ID_DIGITS, Fingerprint, check, of_file, of_text, of_tree, of_value

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
PARTS = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("model", "processor", "template", "data")}
OTHER = "0" * 64


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def backwards(value):
    """The same value, every object with its names in the opposite order."""
    if isinstance(value, dict):
        return {name: backwards(value[name]) for name in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


# Values and texts -------------------------------------------------------------------------------------------


@given(VALUES)
def test_a_value_has_the_hash_of_its_sorted_json(value):
    assert of_value(value) == sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


@given(VALUES)
def test_the_order_of_names_does_not_matter_at_any_depth(value):
    assert of_value(backwards(value)) == of_value(value)


@given(VALUES, VALUES)
def test_two_values_share_a_hash_only_if_their_json_is_the_same(a, b):
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (of_value(a) == of_value(b)) == same


def test_the_order_of_a_list_matters():
    assert of_value([1, 2]) != of_value([2, 1])


@pytest.mark.parametrize("value", [{"k": float("nan")}, {1: "k"}, {"k": {1}}])
def test_a_value_that_is_not_json_has_no_hash(value):
    with pytest.raises(ValueError, match="expected"):
        of_value(value)


@pytest.mark.parametrize("text", ["caf\u00e9\nnoir", " cafe\u0301\r\nnoir\r\n", "\tcaf\u00e9\rnoir"])
def test_every_spelling_of_a_text_has_the_hash_of_its_normal_form(text):
    assert of_text(text) == sha256("caf\u00e9\nnoir".encode())


@given(st.text(), st.text())
def test_two_texts_share_an_id_only_if_they_are_the_same_text(a, b):
    a, b = a.replace("\0", ""), b.replace("\0", "")
    normal_a, normal_b = (
        unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip() for text in (a, b)
    )
    assert (of_text(a)[:ID_DIGITS] == of_text(b)[:ID_DIGITS]) == (normal_a == normal_b)
    assert len(of_text(a)[:ID_DIGITS]) == 16


@pytest.mark.parametrize("text", ["\ud800", "a\0", 7])
def test_what_is_no_text_has_no_hash(text):
    with pytest.raises(ValueError, match="a text to be hashed: expected text"):
        of_text(text)


# Files and folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_a_file_has_the_hash_of_its_bytes(tmp_path, size):
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(n % 251 for n in range(size)))
    assert of_file(file) == of_file(str(file)) == sha256(file.read_bytes())


@pytest.fixture
def model(tmp_path):
    """A model folder: a config, two weight files, a hidden file, a template in a folder of its own."""
    folder = tmp_path / "model"
    (folder / "templates").mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "a.safetensors").write_bytes(b"first")
    (folder / "b.safetensors").write_bytes(b"second")
    (folder / ".hidden").write_bytes(b"")
    (folder / "templates" / "chat.txt").write_bytes(b"hello")
    return folder


def test_a_folder_has_the_hash_of_its_sorted_names_with_their_hashes(model):
    names = [".hidden", "a.safetensors", "b.safetensors", "config.json", "templates/chat.txt"]
    by_hand = "{" + ", ".join(f'"{name}": "{sha256((model / name).read_bytes())}"' for name in names) + "}"
    assert of_tree(model) == of_tree(str(model)) == sha256(by_hand.encode())


def test_where_a_folder_stands_and_when_it_was_made_do_not_matter(model, tmp_path):
    expected = of_tree(model)
    moved = tmp_path / "elsewhere" / "copy"
    moved.mkdir(parents=True)
    for file in sorted((file for file in model.rglob("*") if file.is_file()), reverse=True):
        target = moved / file.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
        os.utime(target, (1, 1))
    assert of_tree(moved) == expected


CHANGES = {
    "a byte": lambda m: (m / "a.safetensors").write_bytes(b"firsT"),
    "a name": lambda m: (m / "a.safetensors").rename(m / "c.safetensors"),
    "a folder": lambda m: (m / "templates").rename(m / "prompts"),
    "a place": lambda m: (m / "templates" / "chat.txt").rename(m / "chat.txt"),
    "a new file": lambda m: (m / "extra").write_bytes(b""),
    "a lost file": lambda m: (m / ".hidden").unlink(),
    "two files that change places": lambda m: (
        (m / "a.safetensors").rename(m / "t"),
        (m / "b.safetensors").rename(m / "a.safetensors"),
        (m / "t").rename(m / "b.safetensors"),
    ),
    "a byte that moves to the next file": lambda m: (
        (m / "a.safetensors").write_bytes(b"firs"),
        (m / "b.safetensors").write_bytes(b"tsecond"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_in_a_folder_changes_its_hash(model, change):
    before = of_tree(model)
    CHANGES[change](model)
    assert of_tree(model) != before


def test_suffixes_choose_the_files_that_count(model):
    weights = of_tree(model, suffixes=(".safetensors",))
    both = of_tree(model, suffixes=(".safetensors", ".json"))
    (model / "templates" / "chat.txt").write_bytes(b"other")
    assert of_tree(model, suffixes=(".safetensors",)) == weights
    (model / "config.json").write_bytes(b"[]")
    assert of_tree(model, suffixes=(".safetensors",)) == weights
    assert of_tree(model, suffixes=(".safetensors", ".json")) != both
    (model / "b.safetensors").write_bytes(b"")
    assert of_tree(model, suffixes=(".safetensors",)) != weights


def test_a_linked_file_counts_with_its_content(model, tmp_path):
    expected = of_tree(model)
    (model / "a.safetensors").rename(tmp_path / "blob")
    (model / "a.safetensors").symlink_to(tmp_path / "blob")
    assert of_tree(model) == expected


def test_nothing_in_a_folder_is_left_out_in_silence(model, tmp_path, monkeypatch):
    link = model / "link"
    for target in (tmp_path, model / "nowhere"):
        link.symlink_to(target)
        with pytest.raises(ValueError, match="link: expected a file"):
            of_tree(model)
        link.unlink()
    os.mkfifo(link)
    with pytest.raises(ValueError, match="link: expected a file"):
        of_tree(model)
    link.unlink()

    real = os.scandir

    def forbidden(folder):
        if str(folder).endswith("templates"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(PermissionError, match="templates"):
        of_tree(model)


def test_an_empty_folder_a_file_and_a_wrong_path_have_no_hash(model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected a folder with a file, found none"):
        of_tree(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"a file that ends in \.pt or \.bin, found none; check the path"):
        of_tree(model, suffixes=(".pt", ".bin"))
    for wrong in (tmp_path / "nowhere", model / "config.json"):
        with pytest.raises(OSError, match=wrong.name):
            of_tree(wrong)


# What a file was made from ----------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_bytes(b"")
    return file


def test_a_fingerprint_is_written_beside_the_file_and_read_back(scores):
    Fingerprint(PARTS).write(scores)
    assert sorted(file.name for file in scores.parent.iterdir()) == [
        "scores.jsonl",
        "scores.jsonl.fingerprint.json",
    ]
    assert Fingerprint.read(scores) == Fingerprint.read(str(scores)) == Fingerprint(PARTS)
    check(Fingerprint(PARTS), scores)


def test_the_digest_is_the_hash_of_the_parts_in_any_order():
    by_hand = sha256(json.dumps(PARTS, sort_keys=True).encode())
    assert Fingerprint(PARTS).digest == Fingerprint(backwards(PARTS)).digest == by_hand
    Fingerprint(PARTS).require(Fingerprint(backwards(PARTS)))


@pytest.mark.parametrize("part", PARTS)
def test_another_part_is_named_with_the_cure_and_the_others_are_not(scores, part):
    Fingerprint(PARTS | {part: OTHER}).write(scores)
    assert Fingerprint.read(scores).digest != Fingerprint(PARTS).digest
    with pytest.raises(ValueError, match="another") as caught:
        check(Fingerprint(PARTS), scores, "run `mmrlhf score` again")
    assert str(caught.value) == (
        f"scores.jsonl was made with another {part} (00000000.. instead of {PARTS[part][:8]}..); "
        "run `mmrlhf score` again"
    )


def test_several_other_parts_are_all_named():
    with pytest.raises(ValueError, match="another") as caught:
        Fingerprint(PARTS).require(Fingerprint(PARTS | {"data": OTHER, "model": OTHER}))
    assert str(caught.value) == (
        f"the file was made with another model (00000000.. instead of {PARTS['model'][:8]}..) "
        f"and another data (00000000.. instead of {PARTS['data'][:8]}..); "
        "make it again or choose another file"
    )


def test_a_part_too_many_or_too_few_is_a_difference():
    fewer = Fingerprint({name: PARTS[name] for name in ("model", "data", "processor")})
    with pytest.raises(ValueError, match=rf"another template \(none instead of {PARTS['template'][:8]}\.\.\);"):
        Fingerprint(PARTS).require(fewer)
    with pytest.raises(ValueError, match=rf"another template \({PARTS['template'][:8]}\.\. instead of none\);"):
        fewer.require(Fingerprint(PARTS))


def test_a_file_without_a_fingerprint_is_refused(scores):
    with pytest.raises(ValueError, match="no scores") as caught:
        check(Fingerprint(PARTS), scores, "run `mmrlhf score` again")
    assert str(caught.value) == (
        f"{scores}: no scores.jsonl.fingerprint.json beside it tells what it was made from; run `mmrlhf score` again"
    )


def test_the_fingerprint_of_another_file_does_not_count(scores):
    Fingerprint(PARTS).write(scores.with_name("other.jsonl"))
    with pytest.raises(ValueError, match="beside it"):
        Fingerprint.read(scores)


def test_a_change_of_any_byte_of_a_fingerprint_is_found(scores):
    Fingerprint(PARTS).write(scores)
    side = scores.with_name("scores.jsonl.fingerprint.json")
    whole = side.read_bytes()
    for at in range(len(whole)):
        side.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"scores\.jsonl\.fingerprint\.json: expected "):
            Fingerprint.read(scores)
        side.write_bytes(whole[:at])
        if at < len(whole) - 1:  # without its newline it says the same
            with pytest.raises(ValueError, match=r"scores\.jsonl\.fingerprint\.json: expected "):
                Fingerprint.read(scores)


@pytest.mark.parametrize(
    "content", [b"[]", b"7", b"null", b"{}", b'{"parts": []}', b'{"parts": {}}', b'{"parts": {"model": 7}}']
)
def test_json_that_is_no_fingerprint_is_refused(scores, content):
    scores.with_name("scores.jsonl.fingerprint.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"scores\.jsonl\.fingerprint\.json: expected a fingerprint"):
        Fingerprint.read(scores)


def test_a_part_exchanged_by_hand_is_found(scores):
    Fingerprint(PARTS).write(scores)
    side = scores.with_name("scores.jsonl.fingerprint.json")
    side.write_text(side.read_text().replace(PARTS["model"], OTHER))
    with pytest.raises(ValueError, match="it was changed by hand"):
        check(Fingerprint(PARTS | {"model": OTHER}), scores)


def test_a_fingerprint_is_replaced_whole(scores, monkeypatch):
    Fingerprint(PARTS).write(scores)

    def fails(_source, _target):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        Fingerprint(PARTS | {"model": OTHER}).write(scores)
    assert Fingerprint.read(scores) == Fingerprint(PARTS)
    assert len(list(scores.parent.iterdir())) == 2


@pytest.mark.parametrize("parts", [{}, {"model": ""}, {"": OTHER}, {"model": None}, {7: OTHER}])
def test_a_fingerprint_without_a_digest_for_each_part_is_refused(parts):
    with pytest.raises(ValueError, match="fingerprint: expected a digest for each named part"):
        Fingerprint(parts)


def test_a_fingerprint_does_not_change_with_the_dict_it_came_from():
    parts = dict(PARTS)
    fingerprint = Fingerprint(parts)
    parts["model"] = OTHER
    assert fingerprint == Fingerprint(PARTS)
