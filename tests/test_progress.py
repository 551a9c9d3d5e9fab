import io
import os
import subprocess
import sys

import nbformat
from joblib import delayed

from headbound import progress


def test_a_bar_writes_to_standard_error_and_never_into_a_notebook(capfd):
    assert list(progress.bar(range(3), "counting")) == [0, 1, 2]
    written = capfd.readouterr()
    assert not written.out
    assert written.err.count("\r") <= 3


def test_what_workers_say_is_logged_and_not_published(tmp_path):
    cell = """
import os, sys, warnings
from headbound import progress
from joblib import delayed

def work(number):
    os.write(2, b"raw ")
    return [number for _ in progress.bar(range(3), "working")][0]

print(progress.parallel([delayed(work)(i) for i in range(4)], 2), work(4))
warnings.warn("to be seen")
"""
    path = tmp_path / "talks.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), path)
    program = (
        "import sys, papermill as p; p.execute_notebook(*2 * sys.argv[1:], kernel_name='python3')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    published = {o.name: o.text for o in nbformat.read(path, as_version=4).cells[0].outputs}
    assert published["stdout"] == "[0, 1, 2, 3] 4\n"
    assert "to be seen" in published["stderr"]
    assert "raw" not in published["stderr"]
    assert done.stderr.count("raw") == 5
    assert "leaked" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bar_is_rare_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress.sys, "__stderr__", log)
    for _ in progress.bar(range(10_000), "many"):
        pass
    assert log.getvalue().count("\r") <= 3


def test_no_more_workers_than_the_environment_allows(monkeypatch):
    jobs = [delayed(os.getpid)() for _ in range(8)]
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert set(progress.parallel(jobs)) == {os.getpid()}  # one worker needs no process
    assert set(progress.parallel(jobs, 1)) == {os.getpid()}
    assert progress.parallel([], 2) == []
    others = set(progress.parallel(jobs, 2))
    assert os.getpid() not in others
    assert len(others) <= 2
