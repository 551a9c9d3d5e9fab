"""requirements.lock is the truth; pyproject.toml, environment.yml and all installed agree."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What an environment is born with, and the package itself.
GIVEN = {"pip", "setuptools", "wheel", "headbound"}
MODELS = [
    line.split(" --hash=")
    for line in (ROOT / "models.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [
        Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")
    ]


LOCK = {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in locked()}
DECLARED = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
INSTALLED = {canonicalize_name(d.name): d for d in distributions() if d.name}


def test_the_lock_pins_every_package_once_and_exactly():
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in locked())
    names = [canonicalize_name(r.name) for r in locked()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("declared", DECLARED)
def test_the_lock_satisfies_what_the_package_asks_for(declared):
    requirement = Requirement(declared)
    version = LOCK.get(canonicalize_name(requirement.name))
    assert version is not None, (
        f"{requirement.name} is in pyproject.toml and not in requirements.lock"
    )
    assert requirement.specifier.contains(version, prereleases=True)


def test_the_lock_is_what_is_installed():
    wrong = {
        name: (str(version), INSTALLED[name].version if name in INSTALLED else "not installed")
        for name, version in LOCK.items()
        # A local label such as +cpu names a build, not another version.
        if name not in INSTALLED or Version(INSTALLED[name].version).public != version.public
    }
    assert not wrong, f"locked and installed differ: {wrong}; remake the environment"


def test_nothing_installed_is_missing_from_the_lock():
    models = {canonicalize_name(Requirement(pinned).name) for pinned, _ in MODELS}
    extra = INSTALLED.keys() - LOCK.keys() - GIVEN - models
    assert not extra, f"installed and not in requirements.lock: {sorted(extra)}"


def test_the_lock_holds_all_that_its_packages_need():
    missing = []
    for name in LOCK:
        for line in INSTALLED[name].requires or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            version = LOCK.get(canonicalize_name(needed.name))
            if version is None and canonicalize_name(needed.name) not in GIVEN:
                missing.append(f"{name} needs {line}")
    assert not missing


def test_the_models_are_pinned_by_their_hashes():
    assert len(MODELS) == 2
    for pinned, digest in MODELS:
        assert re.fullmatch(r"[\w-]+==[\d.]+", pinned)
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`make install` as from a shell: these tests may run below another make, whose flags speak."""
    command = ["make", "install", *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=plain)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_clone_that_was_moved_gets_a_new_environment(tmp_path):
    clone = tmp_path / "a clone, ü 中"
    (clone / ".venv").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "models.lock"):
        shutil.copy(ROOT / name, clone)
    stamp = clone / ".venv" / ".headbound-installed"
    stamp.write_text(str(clone), encoding="utf-8")
    assert "venv --clear" not in make(clone, "-n").stdout
    stamp.write_text("/where/it/was", encoding="utf-8")
    assert "venv --clear" in make(clone, "-n").stdout
    assert not stamp.exists()


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_a_python_that_does_not_fit_is_told_in_one_line(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock", "models.lock"):
        (tmp_path / name).write_text("")
    (line,) = make(tmp_path, "PYTHON=python-of-tomorrow").stdout.splitlines()
    assert "no Python 3.11, 3.12 or 3.13 (tried python-of-tomorrow)" in line
    assert not (tmp_path / ".venv").exists()


def test_conda_users_get_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    (python,) = [entry.removeprefix("python=") for entry in plain if entry.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{python}.0")
    # Nothing is pinned twice: conda brings python, pip and tools, the lock all the rest.
    assert (
        not {canonicalize_name(Requirement(entry).name) for entry in plain if "=" not in entry}
        & LOCK.keys()
    )
    options = [tuple(line.split()) for line in pip]
    assert {("-r", "requirements.lock"), ("--requirement", "requirements.lock")} & set(options)
    assert all(option[0] in {"-r", "--requirement", "-e", "--editable"} for option in options)


def test_this_python_is_the_one_asked_for():
    assert SpecifierSet(PROJECT["requires-python"]).contains(
        ".".join(map(str, sys.version_info[:3]))
    )
