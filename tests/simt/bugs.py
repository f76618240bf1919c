"""Planted bugs: changes of a kernel's text that its emulated tests must notice, by operator."""

from __future__ import annotations

from dataclasses import dataclass

from .build import Kernels, mutate

CUDA = "csrc/cuda"
COMMON = "csrc/common"
ROWS = f"{CUDA}/tile/rows.cuh"
BARRIER = "__syncthreads();"
BARRIER_LINE = "  __syncthreads();\n"


@dataclass(frozen=True)
class Bug:
    """One change of one file.

    Attributes:
        file: the file, relative to the repository.
        pattern, replacement: what is replaced by what; `pattern` occurs once in the file.
        kernel: where `file` is a header, the kernel to build with it instead of the suite's.
        select: the tests that must notice it instead of the suite's.
    """

    file: str
    pattern: str
    replacement: str
    kernel: str | None = None
    select: str | None = None


@dataclass(frozen=True)
class Suite:
    """The bugs planted in an operator, and the tests that must notice them.

    Attributes:
        tests: the file of the tests in this folder.
        kernel: what to build where a header is changed: a .cu file, without its ending.
        select: the tests that run, an expression for pytest's -k; all where it is empty.
        bugs: by what is wrong.
        harmless: a change under which the tests must pass.
    """

    tests: str
    kernel: str
    select: str
    bugs: dict[str, Bug]
    harmless: Bug

    def build(self, bug: Bug) -> Kernels:
        kernel = None if bug.file.endswith(".cu") else bug.kernel or self.kernel
        return mutate(bug.file, bug.pattern, bug.replacement, kernel=kernel)

    def pytest_arguments(self, bug: Bug) -> tuple[str, ...]:
        select = bug.select or self.select
        return (f"tests/simt/{self.tests}", *(("-k", select) if select else ()))


def without(file: str, text: str, kept: str = "", **options: str) -> Bug:
    """The bug that `text` is missing behind `kept`, which makes the place unique."""
    return Bug(file, kept + text, kept, **options)


# ---- the tile product of the emulation's own tests ----------------------------------------------

GEMM_TILE = "tests/simt/kernels/gemm_tile.cu"

EMULATOR = Suite(
    tests="test_emulator.py",
    kernel="gemm_tile",
    select="test_gemm_tile",
    bugs={
        "no barrier before a stage is reused": without(GEMM_TILE, f"    {BARRIER}\n"),
        "no wait": without(GEMM_TILE, "    cp_async_wait_group<kStages - 2>();\n"),
        "wait one group too few": Bug(
            GEMM_TILE, "cp_async_wait_group<kStages - 2>", "cp_async_wait_group<kStages - 1>"
        ),
        "copy into the stage in use": Bug(
            GEMM_TILE,
            "const int stage = chunk % kStages;",
            "const int stage = (chunk + 1) % kStages;",
        ),
        "row off by one": Bug(
            GEMM_TILE,
            "const int row = warp_row + 16 * i + lane % 16;",
            "const int row = warp_row + 16 * i + (lane + 1) % 16;",
        ),
    },
    harmless=Bug(GEMM_TILE, f"    {BARRIER}\n", f"    {BARRIER}\n    __syncwarp();\n"),
)

# ---- the sort of items in shared memory ---------------------------------------------------------

RADIX_SORT = f"{CUDA}/tile/radix_sort.cuh"

SORT = Suite(
    tests="test_sort.py",
    kernel="sort",
    select="",
    bugs={
        "counters cleared while they are read": without(
            RADIX_SORT,
            f"    {BARRIER}\n",
            "      if (exists && before == 0u) counts[digit] += __popc(equal);\n"
            "      __syncwarp();\n    }\n",
        ),
        "counters read before they are there": without(
            RADIX_SORT, f"    {BARRIER}\n", "    count_before(counters);\n"
        ),
        "lanes of a warp out of order": Bug(
            RADIX_SORT,
            "counts[digit] + __popc(before)",
            "counts[digit] + __popc(equal ^ before) - 1",
        ),
        "a digit left out": Bug(RADIX_SORT, "shift += kDigitBits", "shift += 2 * kDigitBits"),
        "the leader counts too early": without(
            RADIX_SORT,
            "      __syncwarp();\n",
            "      if (exists) spare[counts[digit] + __popc(before)] = item;\n",
        ),
    },
    harmless=Bug(
        RADIX_SORT,
        "    count_before(counters);\n",
        f"    count_before(counters);\n    {BARRIER}\n",
    ),
)

# ---- deform_conv --------------------------------------------------------------------------------

DEFORM_FORWARD = f"{CUDA}/deform_conv/deform_conv_fwd.cuh"
DEFORM_INPUT = f"{CUDA}/deform_conv/deform_conv_bwd_input.cuh"
DEFORM_SAMPLES = f"{CUDA}/deform_conv/deform_conv_samples.cuh"
DEFORM_WALK = f"{CUDA}/deform_conv/deform_conv_walk.cuh"
DEFORM_GATHER = f"{CUDA}/deform_conv/deform_conv_bwd_gather.cu"
INPUT_KERNEL = "deform_conv_bwd_input_float32"
ALL_JOBS = "test_jobs and all and float32"
ALL_JOBS_BACKWARD = "test_jobs_backward and all and float32"
OPERANDS_THERE = (
    "      // Both operands of this step are ready; the buffers of the previous step are free.\n"
)

DEFORM_CONV = Suite(
    tests="test_deform_conv.py",
    kernel="deform_conv_fwd_float32",
    select="test_convolutions and vectors and float32",
    bugs={
        "corners read before they are there": without(
            DEFORM_FORWARD,
            f"    {BARRIER}\n",
            "    // The corners are staged, and the buffers of the previous stretch are free.\n",
        ),
        "operands read before they are there": without(
            DEFORM_FORWARD, f"      {BARRIER}\n", OPERANDS_THERE
        ),
        "weights not waited for": without(DEFORM_FORWARD, "      cp_async_wait_all();\n"),
        "the buffer that is being read is written": Bug(
            DEFORM_FORWARD, "buffer ^= 1;", "buffer ^= 0;"
        ),
        "taps beyond nine read the first panels": Bug(
            DEFORM_FORWARD,
            "(launch_.shape.taps() - taps) * kPanel",
            "0 * kPanel",
            select="test_convolutions and large and float32",
        ),
        "pixels beyond the map count in the moments": Bug(
            DEFORM_FORWARD,
            "valid[row] = at.index < 0 ? F(0) : F(1);",
            "valid[row] = F(1);",
            select=ALL_JOBS,
        ),
        "moments of the values before they are rounded": Bug(
            DEFORM_FORWARD,
            "to_compute(from_compute<T>(product_.at(i, j)))",
            "product_.at(i, j)",
            "deform_conv_fwd_bfloat16",
            "test_one_value_is_its_own_mean and bfloat16",
        ),
        "moments of a tile not weighted by its pixels": Bug(
            DEFORM_FORWARD,
            "const F share = added / (count + added);",
            "const F share = F(1) / (count / added + F(2));",
            select="test_jobs and chunks and float32",
        ),
        "a patch's row is taken for its column": Bug(
            f"{CUDA}/deform_conv/deform_conv.cuh",
            "% patches_x * kPatchWidth + row % kPatchWidth",
            "% patches_x * kPatchWidth + row / kPatchWidth",
            select="test_convolutions and middle and float32",
        ),
        "a unit stored where another is read": Bug(
            f"{CUDA}/tile/tile_gemm.cuh", "((unit ^ (row & 7)) << 4)", "((unit ^ (row & 3)) << 4)"
        ),
        "lanes swap the wrong pairs": Bug(
            DEFORM_FORWARD,
            "exchange(words[1], words[3], 2, lane & 2);",
            "exchange(words[1], words[2], 2, lane & 2);",
            "deform_conv_fwd_float16",
            "test_convolutions and vectors and float16",
        ),
        "columns used before they are there": without(
            DEFORM_INPUT,
            f"      {BARRIER}\n",
            "      store_columns(product, now.taps);\n",
            kernel=INPUT_KERNEL,
        ),
        "columns stored where panels are read": Bug(
            DEFORM_INPUT,
            f"      {BARRIER}\n      const int channel =",
            "      const int channel =",
            INPUT_KERNEL,
        ),
        "a panel not waited for": without(
            DEFORM_INPUT, "        cp_async_wait_all();\n", kernel=INPUT_KERNEL
        ),
        "the rows of the first group kept for the second": Bug(
            DEFORM_INPUT,
            "to.new_rows = to.chunk != part || to.group != group;",
            "to.new_rows = to.chunk != part;",
            INPUT_KERNEL,
            "test_convolutions and groups and float32",
        ),
        "channels of a lane taken for neighbours": Bug(
            f"{CUDA}/deform_conv/deform_conv.h",
            "return unit * kPiece + k / kPiece * kSpacing + k % kPiece;",
            "return unit * kUnit + k;",
            "deform_conv_bwd_input_float16",
            "test_convolutions and vectors and float16",
        ),
        "dots of another corner": Bug(
            DEFORM_WALK,
            "2 * (lane & 1) + (lane >> 1)",
            "(lane & 1) + 2 * (lane >> 1)",
            INPUT_KERNEL,
        ),
        "sums of the right corners not handed on": Bug(
            DEFORM_WALK, "handed_on ? sums[right][k] : F(0)", "F(0)", INPUT_KERNEL
        ),
        "values of the right corners not handed on": Bug(
            DEFORM_WALK, "handed_on ? values[right] : ahead[c]", "ahead[c]", INPUT_KERNEL
        ),
        "the last sums of a run do not leave": Bug(
            DEFORM_WALK, "last ? Move::kJump : next.move()", "next.move()", INPUT_KERNEL
        ),
        "a corner beyond the right border": Bug(
            DEFORM_SAMPLES,
            "if (below > 0 && right < map.width)",
            "if (below > 0 && right <= map.width)",
            INPUT_KERNEL,
        ),
        "the first pixel left out": Bug(
            DEFORM_SAMPLES, "if (at.index >= 0) {", "if (at.index > 0) {", INPUT_KERNEL
        ),
        "the samples of one warp only": Bug(
            DEFORM_SAMPLES, "range.add(warps[w]);", "range.least = warps[w].least;", INPUT_KERNEL
        ),
        "values that are not finite go missing": Bug(
            f"{CUDA}/deform_conv/deform_conv_scatter.cuh",
            "if (p_.scatter == Scatter::kFixed) NonFiniteMarks",
            "if (p_.scatter == Scatter::kSum) NonFiniteMarks",
            INPUT_KERNEL,
            "not_finite and float32",
        ),
        "samples at no place are zero": Bug(
            f"{COMMON}/sampling.h",
            "const F lost = F(0) * dy + F(0) * dx;",
            "const F lost = F(0);",
            select="test_not_finite and logits and offset and float32",
        ),
        "corners outside have no weight": Bug(
            f"{CUDA}/deform_conv/deform_conv.cuh",
            "weight_[i] = corners.weight[i];",
            "weight_[i] = corners.pixel[i] < 0 ? F(0) : corners.weight[i];",
            select="test_not_finite and masks and mask and float32",
        ),
        "a gradient that is not finite is lost outside": Bug(
            DEFORM_WALK,
            "zero += F(0) * grad[k];",
            "zero += F(0);",
            INPUT_KERNEL,
            "test_not_finite and masks and gradient and float32",
        ),
        "integer sums lose a digit": Bug(
            f"{CUDA}/deform_conv/deform_conv_scatter.cuh",
            "return sum / scale;",
            "return sum / scale * F(1.001);",
            "deform_conv_bwd_finish",
            "test_deterministic and float32",
        ),
        "predictions of the flat rule gathered by the plain one": Bug(
            DEFORM_GATHER,
            "if (rule == ReadRule::kFlat) {",
            "if (rule == ReadRule::kNone) {",
            select=ALL_JOBS_BACKWARD,
        ),
        "the gate of one tile left out": Bug(
            DEFORM_GATHER,
            "i < tiles.per_image; i += kGatherThreads",
            "i + 1 < tiles.per_image; i += kGatherThreads",
            select=ALL_JOBS_BACKWARD,
        ),
    },
    harmless=Bug(
        DEFORM_FORWARD,
        f"{OPERANDS_THERE}      {BARRIER}\n",
        f"{OPERANDS_THERE}      {BARRIER}\n      {BARRIER}\n",
    ),
)

DEFORM_WEIGHTS_KERNEL = f"{CUDA}/deform_conv/deform_conv_bwd_weights.cuh"
ADD_WEIGHTS = f"{CUDA}/deform_conv/deform_conv_add_weights.cu"

DEFORM_WEIGHTS = Suite(
    tests="test_deform_weights.py",
    kernel="deform_conv_bwd_weights_bfloat16",
    select="test_slices_give and 30 or test_several_launches and bfloat16 or test_every_order",
    bugs={
        "operands read before they are there": Bug(
            DEFORM_WEIGHTS_KERNEL,
            f"      {BARRIER}\n      const std::byte* a =",
            "      __syncwarp();\n      const std::byte* a =",
        ),
        "samples located where others are read": Bug(
            DEFORM_WEIGHTS_KERNEL,
            "locate(predicted, cursor, freed)",
            "locate(predicted, cursor, steps_[buffer])",
        ),
        "another permutation of units stored than read": Bug(
            DEFORM_WEIGHTS_KERNEL,
            "depth_offset(sample % kDepth, thread % kUnits)",
            "unit_offset(sample % kDepth, thread % kUnits)",
        ),
        "channels beyond the last one written": without(
            ADD_WEIGHTS, "    if (channel + k >= slot.count) break;\n"
        ),
        "the last slice is not added": Bug(
            ADD_WEIGHTS, "i < slices; ++i", "i < (slices + 1) / 2; ++i"
        ),
        "a launch forgets those before": Bug(
            ADD_WEIGHTS, "p.add ? value + sum[k]", "p.add ? sum[k]"
        ),
    },
    harmless=Bug(ADD_WEIGHTS, "#pragma unroll 4", "#pragma unroll 2"),
)

# ---- block_coefficients -------------------------------------------------------------------------

COEFFICIENTS_DEVICE = f"{CUDA}/block_coefficients/block_coefficients.cuh"
COEFFICIENTS_FORWARD = f"{CUDA}/block_coefficients/block_coefficients_fwd.cu"
COEFFICIENTS_BACKWARD = f"{CUDA}/block_coefficients/block_coefficients_bwd.cu"
COEFFICIENTS_ARITHMETIC = f"{COMMON}/block_coefficients.h"
NORMALISE = "  normalise(p, jobs, shared.norms);\n"

BLOCK_COEFFICIENTS = Suite(
    tests="test_block_coefficients.py",
    kernel="block_coefficients_bwd",
    select="test_orders_of_threads or test_corners or test_cases",
    bugs={
        "groups read before they are there": without(COEFFICIENTS_FORWARD, BARRIER_LINE, NORMALISE),
        "gates read before they are there": without(
            COEFFICIENTS_FORWARD, BARRIER_LINE, "  gate_logits(p, jobs, shared.norms);\n"
        ),
        "the mean of z read before it is there": without(
            COEFFICIENTS_FORWARD, BARRIER_LINE, "  combine(p, jobs, at, first_block, shared);\n"
        ),
        "the hidden layer read before it is there": Bug(
            COEFFICIENTS_FORWARD, BARRIER_LINE + "  F* coefficients", "  F* coefficients"
        ),
        "a slice leaves a row out": Bug(
            COEFFICIENTS_FORWARD, "min(first + kSliceRows,", "min(first + kSliceRows - 1,"
        ),
        "sums read before they are there": Bug(
            COEFFICIENTS_DEVICE,
            f"  {BARRIER_LINE}    if (thread < lanes",
            "    if (thread < lanes",
        ),
        "sums overwritten while they are read": Bug(
            COEFFICIENTS_DEVICE, f"  {BARRIER_LINE}  }}\n}}", "  }\n}"
        ),
        "gradients of gates read before they are there": without(
            COEFFICIENTS_BACKWARD,
            BARRIER_LINE,
            "  differentiate_gates(p, jobs, at, partials, shared);\n",
        ),
        "the gradient of another normalisation": Bug(
            COEFFICIENTS_BACKWARD, "p.tables.norm[j] !=", "p.tables.norm[0] !="
        ),
        "an image left out": Bug(
            COEFFICIENTS_BACKWARD,
            "const int64_t branches = s.jobs * s.images;",
            "const int64_t branches = s.jobs;",
        ),
        "the slope beyond a corner": Bug(
            COEFFICIENTS_ARITHMETIC, "logit + F(3) < F(6)", "logit + F(3) <= F(6)"
        ),
        "the gate's part forgotten": Bug(
            COEFFICIENTS_ARITHMETIC,
            "(share * grads.mean_z + pooled) * k.a",
            "share * grads.mean_z * k.a",
        ),
        "the spread of the means forgotten": Bug(
            COEFFICIENTS_ARITHMETIC, "from_mean + F(2) * (m - mean) * var", "from_mean"
        ),
    },
    harmless=Bug(COEFFICIENTS_FORWARD, NORMALISE, NORMALISE + BARRIER_LINE),
)

# ---- dynamic_relu -------------------------------------------------------------------------------

RELU_DEVICE = f"{CUDA}/dynamic_relu/dynamic_relu.cuh"
RELU_ARITHMETIC = f"{COMMON}/dynamic_relu.h"
WAIT = "wait_until(arrived, static_cast<unsigned>(blocks) + 1);"
WAIT_LINE = f"  if (threadIdx.x == 0) {WAIT}\n"

DYNAMIC_RELU = Suite(
    tests="test_dynamic_relu.py",
    kernel="dynamic_relu_fwd",
    select="float32 and (test_sizes and hsigmoid or test_images)",
    bugs={
        "sums read before they are there": Bug(
            ROWS, BARRIER_LINE + "  for (int o = thread", "  for (int o = thread"
        ),
        "sums overwritten while they are read": Bug(ROWS, f"  }}\n{BARRIER_LINE}}}", "  }\n}"),
        "no wait for the last block": without(RELU_DEVICE, WAIT_LINE),
        "wait for all arrivals only": Bug(RELU_DEVICE, WAIT, WAIT.replace(" + 1", "")),
        "another block than the last goes on": Bug(
            RELU_DEVICE, "static_cast<unsigned>(blocks) - 1", "static_cast<unsigned>(blocks) / 2"
        ),
        "published before it is written": without(
            RELU_DEVICE, f"\n  {BARRIER}", "void publish(unsigned* arrived) {"
        ),
        "stretches leave a pixel out": Bug(
            RELU_DEVICE, "? first + length : pixels", "? first + length - 1 : pixels"
        ),
        "wrong slope": Bug(
            RELU_ARITHMETIC, "k % 2 == 1 ? slope / F(2)", "k % 2 == 1 ? slope", "dynamic_relu_bwd"
        ),
    },
    harmless=Bug(RELU_DEVICE, WAIT_LINE, WAIT_LINE + BARRIER_LINE),
)

# ---- fuse_branches ------------------------------------------------------------------------------

FUSE_FORWARD = f"{CUDA}/fuse_branches/fuse_branches_fwd.cu"
FUSE_BACKWARD = f"{CUDA}/fuse_branches/fuse_branches_bwd.cu"
FUSE_DEVICE = f"{CUDA}/fuse_branches/fuse_branches.cuh"
FUSE_FORWARD_KERNEL = "fuse_branches_fwd"
UPSAMPLE = f"{COMMON}/upsample.h"
NO_LONGER_READ = f"{BARRIER}  // the last patch's are no longer read"

FUSE_BRANCHES = Suite(
    tests="test_fuse_branches.py",
    kernel="fuse_branches_bwd",
    select="float32 and (test_tilings or test_cases) or small_gradients",
    bugs={
        "positions overwritten while they are read": without(
            FUSE_DEVICE, NO_LONGER_READ, kernel=FUSE_FORWARD_KERNEL
        ),
        "positions read before they are there": without(
            FUSE_DEVICE, f"    {BARRIER}\n", "    }\n", kernel=FUSE_FORWARD_KERNEL
        ),
        "a pixel of a row left out": Bug(
            FUSE_DEVICE,
            "column < patch.columns) f(",
            "column + 1 < patch.columns) f(",
            FUSE_FORWARD_KERNEL,
        ),
        "a scale by the place of its branch": Bug(
            FUSE_DEVICE, "level.branch[b].index * t.images", "b * t.images", FUSE_FORWARD_KERNEL
        ),
        "the blended rows exchanged": Bug(
            FUSE_DEVICE, "(y.second) * width", "(y.first) * width", FUSE_FORWARD_KERNEL
        ),
        "a block's other patches left out": Bug(
            FUSE_FORWARD, "i += level.patches.blocks", "i += level.patches.count"
        ),
        "sums of rows overwritten while they are read": Bug(
            ROWS, f"  }}\n{BARRIER_LINE}}}", "  }\n}"
        ),
        "readers overwritten while they are read": without(FUSE_BACKWARD, NO_LONGER_READ),
        "readers read before they are there": without(FUSE_BACKWARD, f"    {BARRIER}\n", "    }\n"),
        "blocks' sums read before they are there": Bug(
            FUSE_BACKWARD, BARRIER_LINE + "  const auto total_of", "  const auto total_of"
        ),
        "blocks' sums overwritten while they are read": without(
            FUSE_BACKWARD, f"{BARRIER}  // the last image's sums are no longer read"
        ),
        "a warp's blocks left out": Bug(FUSE_BACKWARD, "w < kFuseWarps;", "w < kFuseWarps - 1;"),
        "sums of the first image for all": Bug(
            FUSE_BACKWARD,
            "(level.first_partial + image * level.patches.blocks) *",
            "level.first_partial *",
        ),
        "the shift without the second line": Bug(
            FUSE_BACKWARD, "+ k[2 * t.channels] * total_of(kSumB2)", "+ 0 * k[2 * t.channels]"
        ),
        "g_z kept as float16": Bug(
            FUSE_BACKWARD, "std::conditional_t<std::is_same_v<T, float16>, float, T>", "T"
        ),
        "the last reader left out": Bug(
            UPSAMPLE,
            "(static_cast<int64_t>(i + 1) * span + step - 1) / step",
            "static_cast<int64_t>(i + 1) * span / step",
        ),
        "a reader too early": Bug(
            UPSAMPLE,
            "(static_cast<int64_t>(i - 1) * span + step - 1) / step",
            "static_cast<int64_t>(i - 1) * span / step",
        ),
        "distances from the map's border": Bug(
            UPSAMPLE, "begin * step - static_cast<int64_t>(i) * span", "begin * step"
        ),
    },
    harmless=Bug(FUSE_BACKWARD, NO_LONGER_READ, f"{NO_LONGER_READ}\n    {BARRIER}"),
)

# ---- pack_levels --------------------------------------------------------------------------------

PACK = f"{CUDA}/pack_levels/pack_levels.cu"
TILE_NO_LONGER_READ = f"{BARRIER}  // the last tile is no longer read"

PACK_LEVELS = Suite(
    tests="test_pack_levels.py",
    kernel="pack_levels",
    select="",
    bugs={
        "tile overwritten while it is read": without(PACK, TILE_NO_LONGER_READ),
        "tile read before it is there": without(PACK, BARRIER_LINE, "    });\n  }\n"),
        "the tail of a copy left out": Bug(
            PACK, "i < count; i += kPackThreads", "i < 0; i += kPackThreads"
        ),
        "the first image for all": Bug(
            PACK,
            "level.map.first_row * t.channels + image * size",
            "level.map.first_row * t.channels",
        ),
    },
    harmless=Bug(PACK, TILE_NO_LONGER_READ, f"{TILE_NO_LONGER_READ}\n    {BARRIER}"),
)

SUITES = {
    "emulator": EMULATOR,
    "sort": SORT,
    "deform_conv": DEFORM_CONV,
    "deform_weights": DEFORM_WEIGHTS,
    "block_coefficients": BLOCK_COEFFICIENTS,
    "dynamic_relu": DYNAMIC_RELU,
    "fuse_branches": FUSE_BRANCHES,
    "pack_levels": PACK_LEVELS,
}
