"""The build: what it leaves, and what it does where something is missing."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dyhead_cuda import library
from tests.helpers.builds import built_cpu_library, python_in, run
from tests.helpers.paths import ROOT

# Prints why the CPU library is not used; an empty line where it is.
REASON = "from dyhead_cuda import library as l, fused; print(l.reason('cpu'))"
# Prints the digest of the CUDA library's sources.
DIGEST = "import sys; from pathlib import Path; from dyhead_cuda import sources as s; "
DIGEST += "print(s.digest(Path(sys.argv[1]), 'cuda'))"
Build = Callable[..., "subprocess.CompletedProcess[str]"]

needs_cuda_build = pytest.mark.skipif(
    not library.path("cuda").is_file(), reason="the CUDA library was not built (see info)"
)


def build_directory(name: str) -> Path:
    return ROOT / "build" / f"torch-{library.read_build_record()['torch']['version']}" / name


def write_skeleton(target: Path) -> None:
    """The sources with the schemas but without kernels: the whole build in two seconds."""
    for name in ("cmake", "dyhead_cuda", "csrc"):
        shutil.copytree(
            ROOT / name, target / name, ignore=shutil.ignore_patterns("lib", "__pycache__")
        )
    for kernel in ("cpu", "cuda", "host"):
        shutil.rmtree(target / "csrc" / kernel)
        (target / "csrc" / kernel).mkdir()
    kept = [f"host/{name}" for name in ("tables.h", "tables.cpp", "tensors.h", "device.h")]
    kept += ["host/interface.h", "host/classic_interface.h"]
    kept += [f"cuda/{name}" for name in ("context.h", "mma_choice.h", "tile/launch.cuh")]
    for name in [*kept, "cpu/context.h"]:
        (target / "csrc" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "csrc" / name, target / "csrc" / name)
    schemas = []
    for path in sorted((ROOT / "csrc" / "host").glob("*.cpp")):
        schemas += re.findall(r"^DYHEAD_SCHEMAS\(m\) \{.*?^\}", path.read_text(), re.M | re.S)
    assert len(schemas) == 6
    for i, schema in enumerate(schemas):  # each in a file, as each is a function of one name
        file = target / "csrc" / "host" / f"schemas_{i}.cpp"
        file.write_text(f'#include "device.h"\n{schema}\n')
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target)


def build_in(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Builds the libraries in place, with these environment variables."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DYHEAD_", "CUDA"))}
    return run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env={**kept, **variables},
    )


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A skeleton that is not built."""
    write_skeleton(tmp_path)
    return tmp_path


@pytest.fixture
def build(skeleton: Path) -> Build:
    """Builds the skeleton; keyword arguments are environment variables."""
    return partial(build_in, skeleton)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A skeleton with its CPU library, which is used as long as nothing changes."""
    path = tmp_path_factory.mktemp("built")
    write_skeleton(path)
    result = build_in(path, DYHEAD_REQUIRE="cpu", DYHEAD_CUDA="off")
    assert result.returncode == 0, result.stderr
    assert python_in(path, "-c", REASON).stdout == "\n"
    return path


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return shutil.copytree(
        built_once, tmp_path, ignore=shutil.ignore_patterns("build"), dirs_exist_ok=True
    )


def record(source: Path) -> dict[str, Any]:
    return json.loads((source / "dyhead_cuda" / "lib" / "build.json").read_text())


def libraries(source: Path) -> set[str]:
    return {file.name for file in (source / "dyhead_cuda" / "lib").glob("*.so")}


def test_without_cuda_only_the_cpu_library_is_built(skeleton: Path, build: Build) -> None:
    for variables, reason in (
        ({"DYHEAD_CUDA": "off"}, "switched off by DYHEAD_CUDA=off"),
        ({"CUDACXX": "/nonexistent"}, "CUDACXX=/nonexistent is not a program"),
    ):
        result = build(DYHEAD_REQUIRE="cpu", **variables)
        assert result.returncode == 0, result.stderr
        assert libraries(skeleton) == {"libdyhead_cpu.so"}
        assert record(skeleton)["cpu"]["built"]
        assert reason in record(skeleton)["cuda"]["reason"]
        assert result.stderr.count("the cuda library was not built") == 1
    loaded = python_in(
        skeleton,
        "-c",
        "from dyhead_cuda import library as l; print(l.loaded('cpu'), l.path('cpu'))",
    )
    assert loaded.stdout.split() == ["True", str(library_in(skeleton))]
    assert loaded.stderr == ""  # no noise about CUDA
    required = build(DYHEAD_REQUIRE="cpu,cuda", DYHEAD_CUDA="off")
    assert required.returncode != 0
    assert "DYHEAD_REQUIRE asks for what could not be built: cuda" in required.stderr


def library_in(source: Path) -> Path:
    return source / "dyhead_cuda" / "lib" / "libdyhead_cpu.so"


def test_without_a_compiler_everything_runs_on_the_reference(skeleton: Path, build: Build) -> None:
    result = build(CXX="/nonexistent")
    assert result.returncode == 0, result.stderr
    assert libraries(skeleton) == set()
    reason = "no C++ compiler: CXX=/nonexistent is not a program"
    assert reason in record(skeleton)["cpu"]["reason"]

    info = python_in(skeleton, "-m", "dyhead_cuda", "info", "--json")
    state = json.loads(info.stdout)["libraries"]["cpu"]
    assert not state["loaded"]
    assert reason in state["reason"]
    assert info.stderr.count("is not available") == info.stderr.count(reason) == 1

    script = """
import torch, dyhead_cuda
arguments = [torch.rand(*shape) for shape in ((1, 8, 3, 3), (2, 8), (2,), (32, 2), (32,))]
print(dyhead_cuda.functional.dynamic_relu(*arguments).shape)
with dyhead_cuda.backend("cpu"):
    dyhead_cuda.functional.dynamic_relu(*arguments)
"""
    used = python_in(skeleton, "-c", script)
    assert used.stdout.strip() == "torch.Size([1, 8, 3, 3])"
    assert re.search(f"RuntimeError: .*{re.escape(reason)}.*To fix it", used.stderr)
    assert build(CXX="/nonexistent", DYHEAD_REQUIRE="cpu").returncode != 0


def test_a_compile_error_is_recorded_and_leaves_no_stale_library(
    skeleton: Path, build: Build
) -> None:
    assert build(DYHEAD_REQUIRE="cpu", DYHEAD_CUDA="off").returncode == 0
    assert libraries(skeleton) == {"libdyhead_cpu.so"}
    (skeleton / "csrc" / "cpu" / "broken.cpp").write_text("#error planted in a test\n")
    result = build(DYHEAD_CUDA="off")
    assert result.returncode == 0
    assert libraries(skeleton) == set()
    cpu = record(skeleton)["cpu"]
    assert "planted in a test" in cpu["reason"]
    assert any("planted in a test" in line for line in cpu["log_tail"])
    assert "planted in a test" in result.stderr
    assert build(DYHEAD_CUDA="off", DYHEAD_REQUIRE="cpu").returncode != 0


def test_without_a_gpu_nothing_is_built_for_gpus_at_hand(skeleton: Path, build: Build) -> None:
    programs = skeleton / "programs"
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\n")
    smi.chmod(0o755)
    with_gpu = f"{programs}{os.pathsep}{os.environ['PATH']}"
    result = build(DYHEAD_CUDA="local", PATH=with_gpu, CUDACXX="/nonexistent")
    assert "CUDACXX=/nonexistent is not a program" in record(skeleton)["cuda"]["reason"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    result = build(DYHEAD_CUDA="local", PATH=with_gpu)
    assert result.returncode == 0, result.stderr
    assert libraries(skeleton) == {"libdyhead_cpu.so"}
    assert "run make build for all" in record(skeleton)["cuda"]["reason"]
    # A CUDA library of these sources stays, if it has code for the GPUs here; another does not.
    built, cuda = record(skeleton), library_in(skeleton).with_name("libdyhead_cuda.so")
    sources = run([sys.executable, "-c", DIGEST, skeleton], cwd=skeleton).stdout.strip()
    built["cuda"] = {"built": True, "archs": ["80"], "sources": sources}
    for gpu, changes, stays in (
        ("8.0", {}, True),
        ("9.0", {}, False),
        ("8.0", {"sources": "0"}, False),
    ):
        smi.write_text(f"#!/bin/sh\necho {gpu}\n")
        cuda.write_bytes(b"built before")
        written = {**built, "cuda": {**built["cuda"], **changes}}
        cuda.with_name("build.json").write_text(json.dumps(written))
        build(DYHEAD_CUDA="local", PATH=with_gpu, CUDACXX="/nonexistent")
        assert cuda.exists() == record(skeleton)["cuda"]["built"] == stays


@needs_cuda_build
def test_a_cuda_compile_error_leaves_the_cpu_library_alone(skeleton: Path, build: Build) -> None:
    broken = skeleton / "csrc" / "cuda" / "operator" / "broken.cu"
    broken.parent.mkdir()
    broken.write_text("#error planted in a test\n")
    result = build(DYHEAD_REQUIRE="cpu", DYHEAD_CUDA_ARCHS="80")
    assert result.returncode == 0, result.stderr
    assert libraries(skeleton) == {"libdyhead_cpu.so"}
    assert "planted in a test" in record(skeleton)["cuda"]["reason"]
    broken.write_text("static int unused;\n")
    result = build(DYHEAD_REQUIRE="cpu,cuda", DYHEAD_CUDA_ARCHS="80")
    assert result.returncode == 0, result.stderr
    result = build(DYHEAD_REQUIRE="cpu,cuda", DYHEAD_CUDA_ARCHS="80", DYHEAD_WERROR="on")
    assert result.returncode != 0
    assert "unused" in record(skeleton)["cuda"]["reason"]


@pytest.mark.parametrize(
    "changed", ["host/tables.cpp", "common/sampling.h", "cpu/new.cpp", "../cmake/x"]
)
def test_a_library_of_other_sources_is_not_used(built: Path, changed: str) -> None:
    with (built / "csrc" / changed).open("a") as file:
        file.write("// moved on\n")
    assert "csrc as it is now" in python_in(built, "-c", REASON).stdout


def test_sources_of_the_other_library_do_not_matter(built: Path) -> None:
    (built / "csrc" / "cuda" / "new.cu").write_text("// moved on\n")
    assert python_in(built, "-c", REASON).stdout == "\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SAME = 0", "SAME = 1"),  # and with it CROP = 0
        ('"stride_h", "stride_w"', '"stride_w", "stride_h"'),
    ],
)
def test_a_library_of_other_tables_is_not_used(built: Path, old: str, new: str) -> None:
    jobs = built / "dyhead_cuda" / "ops" / "jobs.py"
    text = jobs.read_text()
    assert text.count(old) == 1
    jobs.write_text(text.replace(old, new).replace("CROP = 1", f"CROP = {int('SAME' not in old)}"))
    result = python_in(built, "-c", REASON)
    assert "where this package writes" in result.stdout
    assert "not used" in result.stderr


def test_a_mistake_in_the_environment_is_told(skeleton: Path, build: Build) -> None:
    assert build(DYHEAD_WERROR="yes", DYHEAD_REQUIRE="cpu").returncode != 0
    reason = record(skeleton)["cpu"]["reason"]
    assert reason == "DYHEAD_WERROR: expected on or off, got 'yes'"
    result = build(DYHEAD_REQUIRE="gpu")
    assert result.returncode != 0
    assert "DYHEAD_REQUIRE: expected names out of ('cpu', 'cuda'), got ['gpu']" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_files_of_an_instruction_set_are_compiled_for_it_alone(
    skeleton: Path, build: Build
) -> None:
    macros = {
        "plain": [],
        "probe_avx2": ["__AVX2__", "__FMA__", "__F16C__"],
        "probe_avx512": ["__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__", "__FMA__"],
        "probe_avx512bf16": ["__AVX512F__", "__AVX512BF16__"],
        "probe_amx": ["__AVX512F__", "__AVX512BF16__", "__AMX_TILE__", "__AMX_BF16__"],
    }
    absent = {
        "plain": "__AVX__",
        "probe_avx2": "__AVX512F__",
        "probe_avx512": "__AVX512BF16__",
        "probe_avx512bf16": "__AMX_TILE__",
    }
    for name, present in macros.items():
        lines = [f"#ifndef {macro}\n#error {macro} is missing\n#endif" for macro in present]
        if name in absent:
            lines.append(f"#ifdef {absent[name]}\n#error {absent[name]} is on\n#endif")
        (skeleton / "csrc" / "cpu" / f"{name}.cpp").write_text("\n".join(lines) + "\n")
    result = build(DYHEAD_REQUIRE="cpu", DYHEAD_CUDA="off")
    assert result.returncode == 0, result.stderr


def vague_functions(file: Path) -> list[str]:
    """Functions of an object file of which the linker keeps one copy out of many."""
    symbols = run(["nm", "-C", "--defined-only", file]).stdout.splitlines()
    return [line.split(" ", 2)[2] for line in symbols if re.match(r"\S+ [WV] ", line)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_code_of_an_instruction_set_cannot_leak_into_other_files(
    skeleton: Path, build: Build
) -> None:
    # Else the copy of an inline function with AVX-512 in it could be the one that all CPUs run.
    (skeleton / "csrc" / "cpu" / "leak_avx2.cpp").write_text(
        "inline int leak(int x) { return x + 1; }\nint (*leak_pointer)(int) = leak;\n"
    )
    assert build(DYHEAD_REQUIRE="cpu", DYHEAD_CUDA="off").returncode == 0
    (planted,) = (skeleton / "build").rglob("leak_avx2.cpp.o")
    assert vague_functions(planted) == ["leak(int)"]
    for source in (ROOT / "csrc" / "cpu").glob("*_avx*.cpp"):
        (compiled,) = build_directory("cpu").rglob(f"{source.name}.o")
        assert vague_functions(compiled) == [], source.name


@built_cpu_library
@pytest.mark.parametrize("name", library.NAMES)
def test_libraries_need_only_the_stable_interface(name: str) -> None:
    if not library.path(name).is_file():
        pytest.skip(f"{name} library: {library.reason(name)}")
    dynamic = run(["readelf", "-dW", library.path(name)]).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert ("libtorch_cuda.so" in needed) == (name == "cuda")
    assert not [file for file in needed if "python" in file or file.startswith("libc10")]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    undefined = run(["nm", "-D", "--undefined-only", library.path(name)]).stdout.split()
    assert [symbol for symbol in undefined if re.match(r"(aoti_)?torch_", symbol)]
    assert not [symbol for symbol in undefined if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py", symbol)]
    exported = run(["nm", "-DC", "--defined-only", library.path(name)]).stdout
    assert "dyhead::" not in exported


@built_cpu_library
@pytest.mark.parametrize("name", library.NAMES)
def test_libraries_and_messages_name_no_directory_of_the_machine(name: str) -> None:
    if not library.path(name).is_file():
        pytest.skip(f"{name} library: {library.reason(name)}")
    content = library.path(name).read_bytes()
    assert b"csrc/host/pack_levels.cpp" in content
    for directory in (ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
        assert str(directory).encode() not in content
    if name == "cpu":
        with pytest.raises(RuntimeError, match="expected levels") as raised:
            torch.ops.dyhead.pack_levels([torch.zeros(2)])
        assert str(ROOT) not in str(raised.value)


def test_the_classic_interface_of_torch(skeleton: Path, build: Build) -> None:
    for file in (skeleton / "csrc" / "host").glob("schemas_*.cpp"):
        if "pack_levels" not in file.read_text():
            file.unlink()  # the headers of this interface take long
    result = build(DYHEAD_REQUIRE="cpu", DYHEAD_CUDA="off", DYHEAD_TORCH_INTERFACE="classic")
    assert result.returncode == 0, result.stderr
    version = ".".join(torch.__version__.split(".")[:2])
    assert record(skeleton)["cpu"]["interface"] == "classic"
    assert record(skeleton)["cpu"]["torch"] == version
    schema = "import torch; print(torch.ops.dyhead.pack_levels.default._schema)"
    loads = f"import torch; torch.ops.load_library('{library_in(skeleton)}'); {schema}"
    assert "pack_levels(Tensor[] levels)" in python_in(skeleton, "-c", loads).stdout
    file = library_in(skeleton).with_name("build.json")
    file.write_text(file.read_text().replace(f'"torch": "{version}"', '"torch": "2.9"'))
    told = python_in(skeleton, "-c", REASON).stdout
    assert told == f"it was built for torch 2.9 alone, found {torch.__version__}\n"


@pytest.mark.parametrize(
    ("version", "requested", "told"),
    [
        ("2.3.1", "", "expected torch >= 2.4, got 2.3"),
        ("2.9.1+cu128", "", "classic 2.9 _GLIBCXX_USE_CXX11_ABI=0"),
        ("2.9.1+cu128", "stable", "expected torch >= 2.10, got 2.9"),
        ("2.10.0", "", "stable 2.10 "),
        ("2.11.0", "", "stable 2.10 "),
        ("2.11.0", "classic", "classic 2.11 _GLIBCXX_USE_CXX11_ABI=0"),
        ("2.11.0", "old", "expected stable, classic or nothing, got 'old'"),
        ("", "", "expected the directory of a torch package"),
    ],
)
def test_which_interface_of_torch_is_chosen(
    tmp_path: Path, version: str, requested: str, told: str
) -> None:
    if version:
        (tmp_path / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    config = tmp_path / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    config.parent.mkdir(parents=True)
    config.write_text('  set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=0")\n')
    (tmp_path / "try.cmake").write_text(
        f"include({ROOT}/cmake/torch_interface.cmake)\n"
        f'dyhead_torch_interface("{tmp_path}" "{requested}")\n'
        'message("${dyhead_interface} ${dyhead_interface_torch} ${dyhead_interface_definitions}")\n'
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = run([shutil.which("cmake", path=path), "-P", tmp_path / "try.cmake"])
    said = result.stderr.replace("DYHEAD_CLASSIC_TORCH;", "").replace("TORCH_TARGET_VERSION", "")
    assert told in " ".join(said.split()), said


Problem = tuple[str, str, str]  # kernel, architecture, what ptxas said


def ptxas_problems(report: str) -> tuple[set[str], list[Problem]]:
    """The architectures that a ptxas report covers, and every kernel that spills in it."""
    archs: set[str] = set()
    problems = []
    kernel, arch = "", ""
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            kernel, arch = match.groups()
            archs.add(arch)
            continue
        uses_stack = "bytes stack frame" in line and re.search(r"\b[1-9]\d* bytes", line)
        # "serialized" is what ptxas says of asynchronous tensor-core products that it made wait.
        if uses_stack or "serialized" in line:
            problems.append((kernel, arch, line.strip()))
    return archs, problems


def test_ptxas_reports_are_read_right() -> None:
    report = """ptxas info    : Compiling entry function '_Z1f' for 'sm_80'
ptxas info    : Function properties for _Z1f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1g' for 'sm_90a'
ptxas info    : Function properties for _Z1g
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
"""
    spill = "16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads"
    assert ptxas_problems(report) == ({"sm_80", "sm_90a"}, [("_Z1g", "sm_90a", spill)])


@needs_cuda_build
def test_no_kernel_spills() -> None:
    checked = {f"sm_{arch}" for arch in library.read_build_record()["cuda"]["archs"]}
    directory = build_directory("cuda")
    files = (directory / "build.ninja").read_text()
    objects = re.findall(r"^build (\S+\.cu\.o):", files, re.MULTILINE)
    sources = {path.name: path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*/*.cu")}
    assert set(sources) < {Path(name).stem for name in objects}
    for name in objects:
        archs, problems = ptxas_problems((directory / f"{name}.log").read_text())
        only_launches = "__global__" not in sources.get(Path(name).stem, "__global__")
        assert only_launches or checked <= archs, f"{name}: no kernel for {checked - archs}"
        assert [problem for problem in problems if problem[1] in checked] == [], name


def test_every_kernel_and_arithmetic_has_a_file_that_stays(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(sources LANGUAGES NONE)\n"
        f"include({ROOT}/cmake/cuda_sources.cmake)\n"
        f"dyhead_cuda_sources(sources {ROOT}/csrc)\n"
        'file(WRITE "${CMAKE_BINARY_DIR}/sources.txt" "${sources}")\n'
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    configure = [shutil.which("cmake", path=path), "-S", tmp_path, "-B", tmp_path / "build"]
    assert run(configure).returncode == 0
    sources = {Path(p) for p in (tmp_path / "build" / "sources.txt").read_text().split(";")}
    instances = {path for path in sources if path.is_relative_to(tmp_path)}
    assert sources - instances == set((ROOT / "csrc" / "cuda").glob("*/*.cu"))
    tensor_cores, others = ("bfloat16", "float16", "tf32"), ("float32", "float64")
    assert {path.stem for path in instances} == {
        *(f"plain_conv_fwd_{arithmetic}" for arithmetic in tensor_cores),
        *(
            f"deform_conv_{kernel}_{arithmetic}"
            for kernel in ("fwd", "bwd_input", "bwd_weights")
            for arithmetic in (*tensor_cores, *others)
        ),
        *(
            f"deform_conv_{kernel}_wgmma_{arithmetic}"
            for kernel in ("fwd", "bwd_input")
            for arithmetic in ("bfloat16", "float16")
        ),
    }
    for instance in instances:
        (header,) = re.findall(r'#include "(.*)"', instance.read_text())
        (template,) = re.findall(r"template struct (\w+)<\w+>;", instance.read_text())
        assert f"{template}<Op>::choose(" in (ROOT / "csrc" / header).read_text()
    times = {path: path.stat().st_mtime_ns for path in instances}
    assert run(configure).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in instances} == times


@built_cpu_library
def test_the_build_record_tells_how_it_was_built() -> None:
    built = library.read_build_record()
    assert built["torch"]["version"] == torch.__version__
    assert "-O3" in built["cpu"]["flags"]
    assert "fast-math" not in json.dumps(built)
    assert re.fullmatch(r"\w+ \d+\.\d+\.\d+", built["cpu"]["compiler"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", built["cpu"]["time"])
