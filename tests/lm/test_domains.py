"""Text domains: the same every time, each document in one part alone."""

from __future__ import annotations

import random

import pytest
import torch

from growmoe.lm import EMBEDDED, ByteTokenizer, TrainError, load_domains
from growmoe.lm.domains import SPLITS, domain_from
from growmoe.lm.sources import FEW_FILES, Document, docstrings, name_of


def text_of(tokens: torch.Tensor) -> bytes:
    return bytes(tokens.tolist())


def documents_of(tokens: torch.Tensor) -> list[bytes]:
    return [d for d in text_of(tokens).split(b"\0") if d]


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_an_embedded_domain_is_the_same_twice_and_its_parts_share_no_document(name):
    domain, again = (load_domains([name], 200_000)[name] for _ in range(2))
    assert domain.digest() == again.digest()
    parts = [set(documents_of(domain.tokens(split))) for split in SPLITS]
    assert all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert [len(domain.tokens(split)) for split in SPLITS] == [180_000, 10_000, 10_000]
    assert domain.num_bytes == (180_000, 10_000, 10_000)


def test_a_smaller_domain_is_the_beginning_of_a_larger_one():
    small, large = (load_domains(["python"], n)["python"] for n in (50_000, 100_000))
    for split in SPLITS:
        begin = text_of(small.tokens(split))[:-1]  # the last document is cut
        assert text_of(large.tokens(split)).startswith(begin)


def test_embedded_domains_are_what_they_say():
    domains = load_domains(list(EMBEDDED), 100_000)
    assert list(domains) == list(EMBEDDED)
    assert b"def " in text_of(domains["python"].train)
    assert b"#include" in text_of(domains["cpp"].train)
    assert b" the " in text_of(domains["english"].train)
    assert b"@generated" not in text_of(domains["cpp"].train)


def test_nothing_is_read_once_the_parts_are_full():
    read = []

    def document(i):
        return Document(f"file {i}", lambda: read.append(i) or f"text {i} ".encode() * 10)

    domain = domain_from("x", [document(i) for i in range(2000)], 2000, ByteTokenizer())
    assert sum(domain.num_bytes) == 2000
    # 1 in 20 validates: the last part to fill needs about 20 · 100 / 80 files
    assert len(read) < 100


def test_a_file_is_in_the_part_that_its_path_says_whatever_lies_beside_it(tmp_path):
    def load(count):
        for i in range(count):
            (tmp_path / f"{i}.txt").write_text(f"this is document {i}")
        domain = load_domains([f"mine={tmp_path}"], 10**6)["mine"]
        return {d: split for split in SPLITS for d in documents_of(domain.tokens(split))}

    before = load(FEW_FILES)
    after = load(2 * FEW_FILES)
    assert len(before) == FEW_FILES and set(before.values()) == set(SPLITS)
    assert before.items() <= after.items()


def test_a_text_that_occurs_twice_counts_once():
    same = [Document(f"file {i}", lambda: b"the same text") for i in range(50)]
    domain = domain_from("x", same, 10_000, ByteTokenizer())
    assert sum(len(documents_of(domain.tokens(s))) for s in SPLITS) == 1


def test_one_file_is_split_inside_and_every_byte_is_somewhere_once(tmp_path):
    text = random.Random(0).randbytes(10_007).replace(b"\0", b"x")
    path = tmp_path / "some.txt"
    path.write_bytes(text)
    domain = load_domains([f"some={path}"], 10**6)["some"]
    first, last = documents_of(domain.train)
    ((validation,), (test,)) = (documents_of(domain.tokens(s)) for s in SPLITS[1:])
    assert first + validation + last + test == text
    assert len(validation) == pytest.approx(len(text) / 20, abs=1)
    assert len(test) == pytest.approx(len(text) / 20, abs=1)


def test_what_is_not_utf8_stays_as_it_is_and_what_is_empty_or_binary_is_left_out(tmp_path):
    latin = "café à la crème ".encode("latin-1") * 20
    (tmp_path / "latin.txt").write_bytes(latin)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\0" * 100)
    (tmp_path / ".hidden").write_bytes(b"secret " * 100)
    domain = load_domains([f"x={tmp_path}"], 10**6)["x"]
    found = b"".join(text_of(domain.tokens(s)) for s in SPLITS)
    assert found.count(b"\xe9") == latin.count(b"\xe9")
    assert b"PNG" not in found and b"secret" not in found
    assert sum(domain.num_bytes) == len(latin) + 4  # two documents train, two more parts


def test_a_pattern_takes_the_files_it_names(tmp_path):
    for name in ("a.md", "b.md", "c.txt"):
        (tmp_path / name).write_text(f"this is {name} " * 40)
    domain = load_domains([f"docs={tmp_path}/*.md"], 10**6)["docs"]
    found = b"".join(text_of(domain.tokens(s)) for s in SPLITS)
    assert b"a.md" in found and b"b.md" in found and b"c.txt" not in found


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("poems=some/where", ("poems", "some/where")),
        ("some/where/poems.txt", ("poems", "some/where/poems.txt")),
        ("some/docs/*.md", ("docs", "some/docs/*.md")),
        ("some/docs/", ("docs", "some/docs/")),
        ("a/b=c.txt", ("b=c", "a/b=c.txt")),
    ],
)
def test_a_path_gives_its_domain_a_name(argument, expected):
    assert name_of(argument) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pyhton"], "no domain 'pyhton': did you mean python?"),
        (["zzz"], "choose from python, cpp, english"),
        (["x=nowhere/at/all"], "no text at nowhere/at/all"),
        (["x=nowhere/*.txt"], "no text at nowhere/"),
        (["x=FOLDER/empty.txt"], "its files hold no text"),
        (["x=FOLDER/full.txt", "x=FOLDER/full.txt"], "two domains are called 'x'"),
    ],
)
def test_a_wrong_name_is_refused_with_a_message(tmp_path, names, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "full.txt").write_text("some text")
    with pytest.raises(TrainError) as caught:
        load_domains([name.replace("FOLDER", str(tmp_path)) for name in names])
    assert message in str(caught.value)


def test_docstrings_are_prose_without_examples_and_indentation():
    source = b'''
def f():
    r"""Does a thing to another thing, in a way that takes more than two hundred characters.

    Parameters of which there are many, so that this is a longer text than a short remark is,
    and still a little longer than that.

    >>> f(1)
    2
    """
    return """too short to be of use"""
'''
    text = docstrings(source)
    assert text.startswith(b"Does a thing")
    assert b"\nParameters of" in text
    assert b">>>" not in text and b"too short" not in text and b"return" not in text
