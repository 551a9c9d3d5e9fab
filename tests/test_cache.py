import errno
import pathlib
import signal
import subprocess
import sys

import pytest

from headbound import cache as cache_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_key_is_of_all_its_parts_and_of_versions():
    keys = [cache_file.key(*parts) for parts in ([b"a"], ["a"], ["a", ""], ["", "a"], [["a"]], [1])]
    keys.append(cache_file.key("a", libraries=["numpy"]))
    assert len(set(keys)) == len(keys)
    assert cache_file.key({"b": 1, "a": 2}) == cache_file.key({"a": 2, "b": 1})


def test_replacing_gives_the_whole_or_nothing(cache):
    path = cache / "results" / "x.txt"
    with cache_file.replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()

    def fail_halfway():
        with cache_file.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_a_kill_while_writing_leaves_the_earlier_result(cache):
    path = cache / "x.txt"
    with cache_file.replacing(path) as temporary:
        temporary.write_text("first")
    code = (
        "import os, pathlib, signal, sys; from headbound import cache as cache_file\n"
        f"with cache_file.replacing(pathlib.Path({str(path)!r})) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert path.read_text() == "first"


def test_what_is_written_is_as_readable_as_other_files_of_the_user(cache):
    path = cache / "x.txt"
    with cache_file.replacing(path) as temporary:
        temporary.write_text("shared")
    plain = cache / "plain.txt"
    plain.write_text("shared")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("name", ["replace", "touch"])
def test_no_space_is_said_with_the_fix(cache, monkeypatch, name):
    path = cache / "x.txt"
    with cache_file.replacing(path) as temporary:
        temporary.write_text("first")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, name, full)
    with (
        pytest.raises(
            OSError,
            match=r"writing .*x.txt: .*No space left on device; free some space, or set HEADBOUND_CAC",
        ),
        cache_file.replacing(path) as temporary,
    ):
        temporary.write_text("second")
    assert path.read_text() == "first"
    assert [p.name for p in cache.iterdir()] == ["x.txt"]


def test_the_cache_is_where_the_reader_says(cache, tmp_path, monkeypatch):
    assert cache_file.cache_dir() == cache
    assert cache.is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADBOUND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        OSError,
        match=r"writing .*: Not a directory; .*set HEADBOUND_CACHE to a folder you can write",
    ):
        cache_file.cache_dir()
