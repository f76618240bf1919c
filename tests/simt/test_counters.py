"""The counters of the emulation, on accesses whose costs are known."""

from __future__ import annotations

from typing import Any

import pytest

from . import build, counting

pytestmark = [pytest.mark.spawns, pytest.mark.usefixtures("simt")]

LOAD, STORE, SUM = "global load", "global store", "atomic"
SHARED_LOAD, SHARED_STORE = "shared load", "shared store"


@pytest.fixture(scope="module")
def kernels() -> build.Kernels:
    return build.counted("accesses")


def one(kernels: build.Kernels, pattern: str, stride: int = 1, **options: Any) -> counting.Counts:
    code = f"simt.counters.run_accesses(simt.counters.Pattern.{pattern}, {stride})"
    return counting.count(code, kernels, **options)


def numbers(counts: counting.Counts, access: str, *names: str) -> tuple[int, ...]:
    return tuple(counts.total(name, access=access) for name in names)


# ---- global memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "access", "stride", "sectors", "lines"),
    [
        ("load4", LOAD, 1, 4, 1),
        ("load4", LOAD, 2, 8, 2),
        ("load4", LOAD, 8, 32, 8),
        ("load4", LOAD, 32, 32, 32),
        ("load4", LOAD, 0, 1, 1),
        ("load16", LOAD, 1, 16, 4),
        ("load16", LOAD, 2, 32, 8),
        ("store4", STORE, 1, 4, 1),
        ("store4", STORE, 8, 32, 8),
        ("atomic4", SUM, 1, 4, 1),
        ("atomic4", SUM, 0, 1, 1),
        ("atomic4", SUM, 8, 32, 8),
        ("atomic16", SUM, 1, 16, 4),
        ("atomic16", SUM, 2, 32, 8),
        ("async_copy", "async read", 1, 16, 4),
    ],
)
def test_sectors(
    kernels: build.Kernels, pattern: str, access: str, stride: int, sectors: int, lines: int
) -> None:
    counts = one(kernels, pattern, stride)
    found = numbers(counts, access, "instructions", "lanes", "sectors", "lines")
    assert found == (1, 32, sectors, lines)
    others = {r.access for r in counts.records} - {access, "async write"}
    assert not others, counts.records


def test_atomics_of_vectors_are_one_or_four(kernels: build.Kernels) -> None:
    counts = one(kernels, "atomic16", vector_atomics=False)
    assert numbers(counts, SUM, "instructions", "lanes", "sectors") == (4, 128, 4 * 16)


def test_lanes_with_fewer_rounds(kernels: build.Kernels) -> None:
    """Round i is one instruction of lanes i to 31, each in a row of its own."""
    counts = one(kernels, "uneven")
    all_lanes = 32 * 33 // 2
    assert numbers(counts, LOAD, "instructions", "lanes", "sectors") == (32, all_lanes, all_lanes)


@pytest.mark.parametrize(("l1_bytes", "misses"), [(65536, 32), (32 * 128, 32), (31 * 128, 64)])
def test_l1_cache(kernels: build.Kernels, l1_bytes: int, misses: int) -> None:
    """A cache of one line less than 32 has lost each by the time it is read again."""
    counts = one(kernels, "twice", 32, l1_bytes=l1_bytes)
    assert numbers(counts, LOAD, "sectors", "l2_sectors") == (64, misses)


def test_arrays(kernels: build.Kernels) -> None:
    ((name, kernel),) = one(kernels, "twice", 8).kernels.items()
    assert name == "accesses_kernel"
    assert (kernel["launches"], kernel["blocks"], kernel["threads"]) == (1, 1, 32)
    assert kernel["arrays"] == {
        "in": {
            "bytes": 16384,
            "loads": 64,
            "l2_loads": 32,
            "stores": 0,
            "atomics": 0,
            "distinct_read": 32,
            "distinct_written": 0,
        }
    }


# ---- shared memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "bytes_", "stride", "wavefronts", "ideal"),
    [
        ("shared4", 4, 1, 1, 1),
        ("shared4", 4, 2, 2, 1),
        ("shared4", 4, 32, 32, 1),
        ("shared4", 4, 33, 1, 1),
        ("shared4", 4, 0, 1, 1),
        ("shared8", 8, 1, 2, 2),
        ("shared8", 8, 2, 4, 2),
        ("shared8", 8, 16, 32, 2),
        ("shared16", 16, 1, 4, 4),
        ("shared16", 16, 2, 8, 4),
        ("shared16", 16, 8, 32, 4),
        ("shared16", 16, 9, 4, 4),
    ],
)
def test_bank_conflicts(
    kernels: build.Kernels, pattern: str, bytes_: int, stride: int, wavefronts: int, ideal: int
) -> None:
    counts = one(kernels, pattern, stride)
    for access in (SHARED_LOAD, SHARED_STORE):
        (record,) = counts.select(access=access)
        assert record.bytes == bytes_
        assert (record.instructions, record.lanes) == (1, 32)
        assert (record.wavefronts, record.ideal_wavefronts) == (wavefronts, ideal)


def test_broadcast_is_one_wavefront(kernels: build.Kernels) -> None:
    counts = one(kernels, "broadcast")
    assert numbers(counts, SHARED_LOAD, "instructions", "wavefronts") == (1, 1)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (8, 32), (9, 4)])
def test_neighbouring_words_are_one_access(
    kernels: build.Kernels, stride: int, wavefronts: int
) -> None:
    (record,) = one(kernels, "shared_row", stride).select(access=SHARED_LOAD)
    assert (record.bytes, record.instructions, record.wavefronts) == (16, 1, wavefronts)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8), (8, 32), (9, 4)])
def test_ldmatrix(kernels: build.Kernels, stride: int, wavefronts: int) -> None:
    counts = one(kernels, "ldmatrix", stride)
    found = numbers(counts, "ldmatrix", "instructions", "wavefronts", "ideal_wavefronts")
    assert found == (1, wavefronts, 4)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 4), (2, 8)])
def test_asynchronous_copies_write_shared_memory(
    kernels: build.Kernels, stride: int, wavefronts: int
) -> None:
    counts = one(kernels, "async_copy", stride)
    assert numbers(counts, "async write", "instructions", "wavefronts") == (1, wavefronts)


# ---- the rest ------------------------------------------------------------------------


def test_products(kernels: build.Kernels) -> None:
    counts = one(kernels, "mma")
    assert numbers(counts, "mma", "instructions", "flop") == (1, 2 * 16 * 8 * 16)


def test_barriers_and_places() -> None:
    code = "simt.emulator.reverse(np.ones((5, 128), np.float32), True)"
    counts = counting.count(code, build.counted("basics"))
    assert numbers(counts, "barrier", "instructions") == (5,)
    (record,) = counts.select(access=LOAD)
    assert (record.kernel, record.function, record.file) == ("reverse_kernel",) * 2 + ("basics.cu",)
    assert record.text == "row[threadIdx.x] = p.in[start + threadIdx.x];"
    assert counts.select(access=LOAD, text="p.in[start") == [record]


# ---- compute capability 9.0 ----------------------------------------------------------


def pipeline(blocks: int, **options: Any) -> counting.Counts:
    """Clusters of two blocks: 64 rows each times 256 columns, five chunks of the depth."""
    code = (
        f"simt.hopper.pipeline(np.zeros(({64 * blocks}, 320), np.uint16), "
        "np.zeros((5, 256 * 128), np.uint8), 2)"
    )
    return counting.count(code, build.counted("hopper"), **options)


def test_bulk_copies_read_once_for_a_cluster() -> None:
    counts = pipeline(blocks=2)
    chunk = 256 * 128
    # Each of the two blocks copies half of each chunk, to both.
    found = numbers(counts, "async read", "instructions", "sectors", "l2_sectors")
    assert found == (2 * 5, 5 * chunk // 32, 5 * chunk // 32)
    found = numbers(counts, "async write", "instructions", "wavefronts", "ideal_wavefronts")
    assert found == (2 * 2 * 5, 2 * 5 * chunk // 128, 2 * 5 * chunk // 128)
    (record,) = counts.select(access="async read")
    assert (record.function, record.file) == ("fill_stages", "hopper.cu")
    assert counts.kernels["pipeline_kernel"]["arrays"]["b"]["distinct_read"] == 5 * chunk // 32


def test_warpgroups_read_their_operand_once() -> None:
    counts = pipeline(blocks=2)
    products = 2 * 5 * 4  # of all blocks: a warpgroup each, four steps a chunk
    found = numbers(counts, "operand read", "instructions", "wavefronts", "ideal_wavefronts")
    assert found == (products, products * 256 * 32 // 128, products * 256 * 32 // 128)
    assert numbers(counts, "mma", "instructions", "flop") == (4 * products, 2 * 128 * 256 * 320)
    (record,) = counts.select(access="operand read")
    assert (record.function, record.file) == ("multiply", "hopper.cu")
    assert numbers(counts, "barrier", "instructions") == (2 * 2,)  # cluster_sync, of blocks


def test_samples_are_whole_clusters() -> None:
    kernel = pipeline(blocks=8, sampled_blocks=3).kernels["pipeline_kernel"]
    assert (kernel["blocks"], kernel["sampled_blocks"]) == (8, 4)


# ---- reports -------------------------------------------------------------------------


def test_steps(kernels: build.Kernels) -> None:
    run = "simt.counters.run_accesses(simt.counters.Pattern.load4, {})"
    code = f"{run.format(1)}\nstep('first')\n{run.format(2)}\nstep('second')"
    steps = counting.count_steps(code, kernels)
    assert {name: counts.total("sectors") for name, counts in steps.items()} == {
        "first": 4,
        "second": 8,
        "": 0,
    }


def test_table_names_the_place(kernels: build.Kernels) -> None:
    text = counting.table(one(kernels, "load4", 8).records)
    assert "accesses_kernel accesses_kernel: sum = p.in[at];" in text
    assert "32" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("pattern", "change", "replacement", "access", "number"),
    [
        ("load4", "const int at = lane * p.stride;", "const int at = 2 * lane;", LOAD, "sectors"),
        (
            "shared16",
            "load_vec<N>(shared + N * lane",
            "load_vec<N>(shared + 2 * N * lane",
            SHARED_LOAD,
            "wavefronts",
        ),
    ],
)
def test_planted_stride_changes_counts(
    kernels: build.Kernels, pattern: str, change: str, replacement: str, access: str, number: str
) -> None:
    planted = build.mutate("tests/simt/kernels/accesses.cu", change, replacement, count=True)
    before = one(kernels, pattern).total(number, access=access)
    assert one(planted, pattern).total(number, access=access) == 2 * before


def test_kernels_that_do_not_count_say_so(simt: Any) -> None:
    with pytest.raises(RuntimeError, match=r"not built for counting: use build\.counted"):
        simt.counters.read()
