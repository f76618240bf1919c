"""The planted bugs by operator; those of `deform_conv` have a file of their own."""

from __future__ import annotations

from .bugs_deform_conv import (
    DEFORM_CONV,
    DEFORM_WEIGHTS,
    OFFSET_DEFORM_CONV,
    PLAIN_CONV,
    SORT,
)
from .bugs_wgmma import WGMMA_BACKWARD, WGMMA_CONV
from .planted import BARRIER, BARRIER_LINE, COMMON, CUDA, ROWS, Bug, Suite, without

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

# ---- the functions of compute capability 9.0 ----------------------------------------------------

HOPPER = "tests/simt/kernels/hopper.cu"
HOPPER_DEVICE = f"{CUDA}/tile/hopper.cuh"
COMMIT = "if (p.fault != PipelineFault::kNoCommit) wgmma_commit();"

HOPPER_FUNCTIONS = Suite(
    tests="test_hopper.py",
    kernel="hopper",
    select="test_pipeline",
    bugs={
        "an operand without its part of the depth": Bug(
            HOPPER_DEVICE, "simt::shared_offset(rows) + offset", "simt::shared_offset(rows)"
        ),
        "groups of rows too near": Bug(HOPPER_DEVICE, "kStride = 1024;", "kStride = 512;"),
        "another permutation": Bug(HOPPER_DEVICE, "kSwizzle128 = 1;", "kSwizzle128 = 2;"),
        "copies to the own block": Bug(HOPPER, "(1u << cluster) - 1u", "1u << cluster_rank()"),
        "the same part from all blocks": Bug(
            HOPPER, "const unsigned first = part * cluster_rank();", "const unsigned first = 0;"
        ),
        "too few bytes expected": Bug(
            HOPPER,
            "mbarrier_arrive_expect(&pipeline.full[stage], kStageBytes);",
            "mbarrier_arrive_expect(&pipeline.full[stage], part);",
            select="test_pipeline and not 1-2",
        ),
        "the parity of full stages for empty ones": Bug(HOPPER, "(use & 1u) ^ 1u", "use & 1u"),
        "a stage released in the first block": Bug(
            HOPPER,
            "mbarrier_arrive_at(empty, static_cast<unsigned>(rank));",
            "mbarrier_arrive_at(empty, 0u * static_cast<unsigned>(rank));",
        ),
        "wait one group too few": Bug(
            HOPPER,
            "PipelineFault::kNoWait) wgmma_wait<0>();",
            "PipelineFault::kNoWait) wgmma_wait<1>();",
        ),
        "a step too few": Bug(
            HOPPER,
            "step < kSteps; ++step) {\n      uint64_t",
            "step < kSteps - 1; ++step) {\n      uint64_t",
        ),
        "registers of the left operand exchanged": Bug(
            HOPPER, "2 * t + i / 2 * 8;", "2 * t + i % 2 * 8;"
        ),
    },
    harmless=Bug(HOPPER, COMMIT, f"{COMMIT}\n    wgmma_commit();"),
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
    optimize=False,
    select="test_orders_of_threads or test_corners or test_cases or test_only_what_is_wanted",
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
            "  if (!wants_norms(p)) return;\n",
        ),
        "the gradient of another normalisation": Bug(
            COEFFICIENTS_BACKWARD, "p.tables.norm[j] !=", "p.tables.norm[0] !="
        ),
        "an image left out": Bug(
            COEFFICIENTS_BACKWARD,
            "const int64_t branches = s.jobs * s.images;",
            "const int64_t branches = s.jobs;",
        ),
        "a partial sum left out where only a bias is wanted": Bug(
            COEFFICIENTS_BACKWARD,
            "return p.grad_fc1_weight != nullptr || p.grad_fc1_bias != nullptr;",
            "return p.grad_fc1_weight != nullptr;",
        ),
        "the variance left out where the mean is not wanted": Bug(
            COEFFICIENTS_BACKWARD,
            "if (p.grad_mean == nullptr && p.grad_var == nullptr) continue;",
            "if (p.grad_mean == nullptr) continue;",
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
RELU_BACKWARD = f"{CUDA}/dynamic_relu/dynamic_relu_bwd.cu"
RELU_ARITHMETIC = f"{COMMON}/dynamic_relu.h"
WAIT = "wait_until(arrived, static_cast<unsigned>(blocks) + 1);"
WAIT_LINE = f"  if (threadIdx.x == 0) {WAIT}\n"

DYNAMIC_RELU = Suite(
    tests="test_dynamic_relu.py",
    kernel="dynamic_relu_fwd",
    optimize=False,
    select="float32 and (test_sizes and hsigmoid or test_images or test_only_what_is_wanted)",
    bugs={
        "sums read before they are there": Bug(
            ROWS, BARRIER_LINE + "  const int channels", "  const int channels"
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
        "the layers left out where only the gradient of rows is wanted": Bug(
            RELU_BACKWARD,
            "if (p.call.grad_hidden == nullptr && p.call.grad_rows == nullptr) return;",
            "if (p.call.grad_hidden == nullptr) return;",
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
    optimize=False,
    select="float32 and (test_tilings or test_cases or only_what_is_wanted) or small_gradients",
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
        "curves overwritten while they are read": without(
            FUSE_BACKWARD, f"{BARRIER}  // the curves are no longer read"
        ),
        "a kept vector over that of another thread": Bug(
            FUSE_DEVICE, "kPart * kThreads;", "kPart * (kThreads - 1);"
        ),
        "a sum of the shift left out where only it is wanted": Bug(
            FUSE_BACKWARD,
            "const bool of_shift = k == kSumB1 || k == kSumB2;",
            "const bool of_shift = k == kSumB1;",
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
    "hopper": HOPPER_FUNCTIONS,
    "sort": SORT,
    "deform_conv": DEFORM_CONV,
    "plain_conv": PLAIN_CONV,
    "wgmma_conv": WGMMA_CONV,
    "wgmma_backward": WGMMA_BACKWARD,
    "deform_weights": DEFORM_WEIGHTS,
    "offset_deform_conv": OFFSET_DEFORM_CONV,
    "block_coefficients": BLOCK_COEFFICIENTS,
    "dynamic_relu": DYNAMIC_RELU,
    "fuse_branches": FUSE_BRANCHES,
    "pack_levels": PACK_LEVELS,
}
