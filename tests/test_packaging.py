"""What the build packs: the wheel, the sources, and their metadata."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dyhead_cuda import library
from dyhead_cuda.version import __version__
from tests.helpers.builds import built_cpu_library, python_in, run
from tests.helpers.paths import ROOT


@pytest.fixture
def packing() -> Iterator[None]:
    """Packing writes into the working tree, so one process at a time does it."""
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "packing.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def packing_environment() -> dict[str, str]:
    """Variables under which a build of the working tree changes nothing of what is built."""
    built = library.read_build_record()
    cuda, variables = built.get("cuda", {}), dict(os.environ)
    for name, option, flags in (
        ("DYHEAD_WERROR", "-Werror", built["cpu"].get("flags", "")),
        ("DYHEAD_LINEINFO", "-lineinfo", cuda.get("flags", "")),
    ):
        variables[name] = "on" if option in flags.split() else "off"
    if cuda.get("built"):
        variables["DYHEAD_CUDA_ARCHS"] = ";".join(cuda["archs"])
    else:
        variables["DYHEAD_CUDA"] = "off"
    return variables


@built_cpu_library
@pytest.mark.usefixtures("packing")
def test_the_wheel_holds_the_libraries_for_every_python(
    tmp_path: Path, packing_environment: dict[str, str]
) -> None:
    options = ["--no-build-isolation", "--no-deps", "--quiet", "--disable-pip-version-check"]
    result = run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path / "wheel", "."],
        cwd=ROOT,
        env=packing_environment,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    machine = platform.machine()
    assert re.fullmatch(rf"dyhead_cuda-{__version__}-py3-none-\w+_{machine}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    unpacked = tmp_path / "site" / "dyhead_cuda"
    for name in library.NAMES:
        in_place = library.path(name)
        packed = unpacked / "lib" / in_place.name
        assert packed.is_file() == in_place.is_file()
        assert not in_place.is_file() or packed.read_bytes() == in_place.read_bytes()
    python = {file.relative_to(ROOT) for file in (ROOT / "dyhead_cuda").rglob("*.py")}
    assert {file.relative_to(tmp_path / "site") for file in unpacked.rglob("*.py")} == python
    assert (unpacked / "py.typed").is_file()
    assert {path.name for path in (tmp_path / "site").iterdir()} == {
        "dyhead_cuda",
        f"dyhead_cuda-{__version__}.dist-info",
    }
    loaded = python_in(
        tmp_path / "site", "-c", "from dyhead_cuda import library as l; print(l.path('cpu'), "
        "l.loaded('cpu'), [l.read_build_record()[n]['built'] for n in l.NAMES])"
    )  # fmt: skip
    built = [library.path(name).is_file() for name in library.NAMES]
    assert loaded.stdout.strip() == f"{unpacked / 'lib' / 'libdyhead_cpu.so'} True {built}"


@pytest.mark.usefixtures("packing")
def test_the_source_distribution_holds_what_the_build_needs(tmp_path: Path) -> None:
    result = run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "cmake", "dyhead_cuda", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", "lib"} & set(path.parts)
    }
    files = {"CMakeLists.txt", "Makefile", "constraints.txt", "LICENSE", ".ci/run"}
    files |= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/workflows/ci.yml"}
    assert sources | files <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_metadata_and_sources_need_no_torch(tmp_path: Path) -> None:
    # As pip has it, which builds without the packages of the environment.
    code = """
import runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTorch())
sys.argv = ["setup.py", "--quiet", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""
    for command in (["egg_info", "--egg-base"], ["dist_info", "--output-dir"]):
        made = run([sys.executable, "-c", code, *command, tmp_path], cwd=ROOT)
        assert made.returncode == 0, made.stderr
    (information,) = tmp_path.glob("*.dist-info")
    metadata = (information / "METADATA").read_text()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.4\n" in metadata


def test_the_installed_torch_is_found_where_pip_hides_it(tmp_path: Path) -> None:
    code = """
import runpy, sys, sysconfig
sys.argv = ["setup.py", "--quiet", "--name"]
setup = runpy.run_path("setup.py")
sys.path = [path for path in sys.path if "site-packages" not in path]
sysconfig.get_path = lambda name: sys.argv_platlib
sys.argv_platlib = "PLATLIB"
print(setup["Torch"].find())
"""
    package = tmp_path / "torch"
    package.mkdir()
    for there in (True, False):
        version = package / "version.py"
        version.write_text("__version__ = '2.7.1'\ncuda = None\n") if there else version.unlink()
        script = code.replace("PLATLIB", str(tmp_path))
        result = run([sys.executable, "-c", script], cwd=ROOT)
        if there:
            assert f"{package}'), version='2.7.1', cuda=None" in result.stdout
        else:
            assert "torch is not installed for" in result.stderr
