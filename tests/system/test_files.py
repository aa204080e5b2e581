"""Files that are whole or absent, on a disk that is full or may not be written."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dskd.errors import DataError, DiskError
from dskd.system.disk import writing
from dskd.system.files import is_inside, read_manifest, remove_temporaries, write_atomic
from tests.disks import limited, small_disk

LARGE = bytes(100_000)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_does_not_fit_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    with limited(1000), pytest.raises(DiskError) as caught:
        write_atomic(path, LARGE, "the settings")
    assert str(caught.value) == (
        f"{path}: cannot write the settings: a file may not be that large here (see ulimit -f) "
        "(File too large)"
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        for path in (disk / "a.json", disk / "new" / "a.json"):
            with pytest.raises(DiskError) as caught:
                write_atomic(path, LARGE, "the settings")
            assert str(caught.value).startswith(f"{path}: cannot write the settings: the disk is f")
            assert not list(path.parent.glob("*.json")) + list(path.parent.glob(".*"))


def test_a_killed_jobs_temporary_files_are_removed(tmp_path):
    kept = [".lock", ".a.tmp", "a.12.tmp", ".a.x.tmp", "a.json"]
    for name in (".a.json.12.tmp", ".shard-00000.safetensors.4711.tmp", *kept):
        (tmp_path / name).touch()
    (tmp_path / ".folder.1.tmp").mkdir()
    remove_temporaries(tmp_path)
    remove_temporaries(tmp_path / "absent")
    assert names(tmp_path) == sorted([*kept, ".folder.1.tmp"])


def by_torch(path):
    torch.save({"a": torch.zeros(50_000)}, path)


def by_safetensors(path):
    save_file({"a": torch.zeros(50_000)}, path)


def by_tokenizers(path):
    vocabulary = {f"token {index:06d}": index for index in range(9000)}
    Tokenizer(WordLevel(vocabulary, unk_token="token 000000")).save(str(path))


def by_us(path):
    path.write_bytes(LARGE)


@pytest.mark.parametrize("write", [by_torch, by_safetensors, by_tokenizers, by_us])
def test_whichever_library_finds_the_disk_full(tmp_path, write):
    def refused(named, path):
        with pytest.raises(DiskError) as caught, writing("the model", named):
            write(path)
        return str(caught.value).removeprefix(f"{named}: cannot write the model: ")

    path = tmp_path / "weights"
    with limited(9000):
        assert refused(path, path).startswith("a file may not be that large here")
    with small_disk(tmp_path / "disk", "64k") as disk:
        for named in (disk / "weights", disk):
            assert refused(named, disk / "weights").startswith("the disk is full (No space left")
            assert names(disk) in ([], ["weights"])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_disk_that_cannot_be_written_says_why(tmp_path, number):
    with pytest.raises(DiskError) as caught, writing("the model", tmp_path / "a"):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: cannot write the model: ")
    assert os.strerror(number) in str(caught.value)


@pytest.mark.parametrize(
    "problem",
    [
        ValueError("a defect"),
        RuntimeError("a defect"),
        DataError("no text"),
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/corpus.txt"),
    ],
)
def test_what_is_not_the_disks_fault_is_raised_as_it_is(tmp_path, problem):
    (tmp_path / "whole").write_bytes(b"whole")
    with pytest.raises(type(problem)) as caught, writing("the model", tmp_path / "whole"):
        raise problem
    assert caught.value is problem
    assert names(tmp_path) == ["whole"]


def test_a_manifest_that_is_nested_too_deeply_is_damaged(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: damaged, not readable as JSON"):
        read_manifest(tmp_path / "manifest.json", DataError)


def test_which_names_lie_inside_a_folder():
    inside = ["a", "a/b.pt", "./a", "a..b", "..a/b", "a\\b", " "]
    outside = ["..", "../a", "a/../b", "a/..", "/a", "//a", "", ".", "a\0b", 3, None, ["a"]]
    assert all(map(is_inside, inside))
    assert not any(map(is_inside, outside))
