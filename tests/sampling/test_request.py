"""Requests: prompts and labels by seed, values that cannot be, and files of prompts."""

import pytest

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling import Request
from lowtide.settings import EvaluationSettings, Settings


def test_prompts_and_labels_follow_the_seed():
    request = Request(seeds=(4, 5, 9), prompts=("zero", "one"))
    assert request.by_seed(request.prompts) == ["zero", "one", "one"]
    batches = Request(seeds=tuple(range(5)), batch=2).batches()
    assert [batch.seeds for batch in batches] == [(0, 1), (2, 3), (4,)]


def test_any_sequence_is_taken_and_held_as_a_tuple():
    request = Request(seeds=range(2), prompts=["a cat"], labels=[1])
    assert request == Request(seeds=(0, 1), prompts=("a cat",), labels=(1,))
    assert Settings(prompts=["a cat"], labels=range(2)) == Settings(
        prompts=("a cat",), labels=(0, 1)
    )
    assert EvaluationSettings(seeds=range(2)) == EvaluationSettings(seeds=(0, 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": ()}, "no seeds"),
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"eta": 1.5}, "eta 1.5; expected a number from 0 to 1"),
    ],
)
def test_requests_that_cannot_be(wrong, words):
    with pytest.raises(BadInput, match=words):
        Request(**wrong)


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa café\r\n\n  a cat  \n".encode())
    assert sampling.read_prompts(path) == ("a café", "a cat")
    assert len(sampling.read_prompts(None)) == 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found no prompt in .*prompts.txt"),
        (b"\n \n", "found no prompt in .*prompts.txt"),
        (b"\x89PNG\r\n\x1a\n", "found bytes in .*prompts.txt that are not UTF-8"),
        ("a cat\n".encode("utf-16"), "found bytes in .*prompts.txt that are not UTF-8"),
        ("a cat\n".encode("utf-16-le"), "found zero bytes in .*prompts.txt"),
    ],
)
def test_a_file_without_prompts(content, words, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        sampling.read_prompts(path)


def test_prompts_from_no_file(tmp_path):
    with pytest.raises(BadInput, match="found a folder at"):
        sampling.read_prompts(tmp_path)
    with pytest.raises(BadInput, match="found no file"):
        sampling.read_prompts(tmp_path / "nothing.txt")
