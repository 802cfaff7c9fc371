import pytest

from ptv2_core.errors import ArtifactError
from ptv2_serving.checks import Entry, check_listing, write_bounded


def entry(name, size=10, *, is_file=True):
    return Entry(name=name, is_file=is_file, size_bytes=size)


BOTH = [entry("prompt.json"), entry("prompt.safetensors", 20)]


def test_checks_listing_of_the_two_files_gives_their_sizes():
    assert check_listing(BOTH, "here") == {"prompt.json": 10, "prompt.safetensors": 20}


def test_checks_listing_without_sizes_gives_the_largest_there_may_be():
    sizes = check_listing([entry(e.name, None) for e in BOTH], "here")
    assert sizes == {"prompt.json": 16 * 2**20, "prompt.safetensors": 2**35}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "here: expected a file prompt.safetensors, found none"),
        (BOTH[:1], "expected a file prompt.safetensors, found none"),
        ([*BOTH, BOTH[0]], "found 'prompt.json'; a prompt is these two"),
        ([*BOTH, entry("MLmodel")], "found 'MLmodel'"),
        ([BOTH[0], entry("prompt.safetensors", is_file=False)], "expected a plain file"),
        ([BOTH[0], entry("prompt.safetensors", 0)], "expected 1 to 34,359,738,368 bytes, got 0"),
        ([BOTH[1], entry("prompt.json", 2**25)], "expected 1 to 16,777,216 bytes, got 33554432"),
        ([BOTH[1], entry("prompt.json", True)], "got True"),
    ],
)
def test_checks_other_listings_are_refused(entries, message):
    with pytest.raises(ArtifactError, match=message):
        check_listing(entries, "here")


def test_checks_no_more_is_written_than_announced(tmp_path):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield b"x" * 10

    with pytest.raises(ArtifactError, match="expected at most 25 bytes, got more"):
        write_bounded(endless(), tmp_path / "file", most_bytes=25)
    assert (len(taken), (tmp_path / "file").stat().st_size) == (3, 20)


def test_checks_written_file_is_new_and_its_sha256_known(tmp_path):
    found = write_bounded([b"a", b"bc"], tmp_path / "file", most_bytes=3)
    assert found == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileExistsError):
        write_bounded([b"a"], tmp_path / "file", most_bytes=3)
