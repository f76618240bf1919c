"""Planted bugs of `deform_conv` with wgmma."""

from __future__ import annotations

from .planted import CUDA, Bug, Suite, without

WGMMA = f"{CUDA}/deform_conv/deform_conv_fwd_wgmma.cuh"
TILE = f"{CUDA}/tile/wgmma_tile.cuh"
BACKWARD = f"{CUDA}/deform_conv/deform_conv_bwd_input_wgmma.cuh"
BACKWARD_TILE = f"{CUDA}/deform_conv/deform_conv_bwd_input.cuh"
PACKING = f"{CUDA}/deform_conv/deform_conv_pack.cu"
WAIT_FOR_PANEL = "mbarrier_wait(&barriers_->panel_full[panels.buffer], panels.parity);\n"

WGMMA_CONV = Suite(
    tests="test_wgmma_conv.py",
    kernel="deform_conv_fwd_wgmma_bfloat16",
    select="test_works and bfloat16 and (odd or shared or groups)",
    bugs={
        "a panel is replaced while the other block reads it": Bug(
            WGMMA, "panel_empty[i], kClusterBlocks * kTileWarps", "panel_empty[i], kTileWarps"
        ),
        "a panel is given back while it is read": Bug(
            WGMMA, "if (previous >= 0) release(previous);", "release(panels.buffer);"
        ),
        "only this block knows that a panel is free": without(
            WGMMA, "      mbarrier_arrive_at(empty, cluster_rank() ^ 1);\n"
        ),
        "half a panel is expected": Bug(
            WGMMA,
            "mbarrier_arrive_expect(full, kWgmmaPanelBytes)",
            "mbarrier_arrive_expect(full, kHalf)",
        ),
        "each block has its own half": Bug(
            WGMMA, "kAllBlocks = (1u << kClusterBlocks) - 1", "kAllBlocks = 1"
        ),
        "products before the panel is there": without(WGMMA, f"      {WAIT_FOR_PANEL}"),
        "panels of the phase before": Bug(
            WGMMA,
            "panel_full[panels.buffer], panels.parity)",
            "panel_full[panels.buffer], panels.parity ^ 1)",
        ),
        "barriers nobody else can see": without(WGMMA, "      fence_mbarrier_init();\n"),
        "products before their operands": without(WGMMA, "      wgmma_fence();\n"),
        "operands are overwritten": without(WGMMA, "      wgmma_wait<1>();\n"),
        "sums before they are there": Bug(
            WGMMA, "wgmma_wait_all(sums.acc[0]);", "wgmma_wait<1>();"
        ),
        "parts of the depth overlap": Bug(WGMMA, "64 * half + 32 * i", "64 * half + 16 * i"),
        "rows change places": Bug(WGMMA, "[w % 2 * 2 + r]", "[w % 2 + 2 * r]"),
        "the next channels are too near": Bug(
            WGMMA, "units += kStepUnits;", "units += kStepUnits / 2;"
        ),
        "samples of the other lanes are not there yet": without(
            WGMMA,
            "        __syncwarp();\n",
            "to.samples, thread, kStagingThreads);\n",
        ),
        "samples are replaced while they are read": Bug(
            WGMMA,
            "samples_empty[ring.buffer], ring.parity ^ 1)",
            "samples_empty[ring.buffer], ring.parity)",
        ),
        "samples are read before they are there": without(
            WGMMA, "        mbarrier_wait(&barriers_->samples_full[ring.buffer], ring.parity);\n"
        ),
        "samples are given back before the end of the tile": without(
            WGMMA, "        if (holds) release();\n"
        ),
        "a tile beyond the last image is another tile": Bug(
            WGMMA,
            "at.place.tile = launch_.tiles[at.place.job].per_image;",
            "at.place.tile = 0;",
            select="test_works and jobs and bfloat16",
        ),
        "parts of a tile by the other block's rank": Bug(
            WGMMA, "shared * kClusterBlocks + rank;", "shared * kClusterBlocks;"
        ),
        "registers that nobody gave": without(WGMMA, "      give_registers<72>();\n"),
        "a block ends while the other copies to it": without(
            WGMMA,
            "    cluster_sync();\n",
            "    // The other block of the cluster may still copy to this one, and arrive at its "
            "barriers.\n",
        ),
        "weights in the order of another kernel": Bug(
            PACKING, "set.for_wgmma ? wgmma_channel(depth) : depth", "depth"
        ),
    },
    harmless=Bug(
        WGMMA,
        "    load(1);\n    int previous",
        "    load(1);\n    wgmma_fence();\n    int previous",
    ),
)

WGMMA_BACKWARD = Suite(
    tests="test_wgmma_backward.py",
    kernel="deform_conv_bwd_input_wgmma_bfloat16",
    select="(test_works or test_bits) and bfloat16 and (tiles or groups)",
    bugs={
        "operands that the products do not see yet": Bug(
            BACKWARD, "landed() { fence_proxy_async(); }", "landed() {}"
        ),
        "products before their sums": without(BACKWARD, "    wgmma_fence();\n"),
        "products that are not awaited": without(
            BACKWARD, "    wgmma_wait_all(this->acc[0]);\n    wgmma_wait_all(this->acc[1]);\n"
        ),
        "the last products are not awaited": Bug(
            BACKWARD,
            "    wgmma_wait_all(this->acc[0]);\n    wgmma_wait_all(this->acc[1]);\n",
            "    wgmma_wait<1>();\n",
        ),
        "no group of products ends": without(BACKWARD, "    wgmma_commit();\n"),
        "panels are replaced while they are read": without(BACKWARD, "    wgmma_wait<1>();\n"),
        "panels are replaced while the other warpgroup reads them": without(
            BACKWARD, "    __syncthreads();\n"
        ),
        "products of panels that have not landed for all": without(
            BACKWARD_TILE,
            "        __syncthreads();\n",
            "        // This panel has landed for all threads, and the columns are free.\n",
        ),
        "parts of the depth of the rows overlap": Bug(
            BACKWARD, "wgmma_operand(own_rows, 32 * part)", "wgmma_operand(own_rows, 16 * part)"
        ),
        "a part of the depth of the rows alone": Bug(
            BACKWARD, "wgmma_operand(own_rows, 32 * part)", "wgmma_operand(own_rows, 0)"
        ),
        "both halves of the first panels": Bug(BACKWARD, "panels + half * kHalfBytes", "panels"),
        "both warpgroups have the same rows": Bug(
            BACKWARD, "rows + tile_thread() / kWarpgroupThreads * kGroupBytes", "rows"
        ),
        "the sums go on from the step before": Bug(BACKWARD, "chunk > 0 || part > 0", "true"),
        "the last chunk alone": Bug(BACKWARD, "chunk > 0 || part > 0", "part > 0"),
        "rows of the sums change places": Bug(
            TILE, "8 * i + lane() / 4", "8 * (1 - i) + lane() / 4"
        ),
        "columns of the sums change places": Bug(TILE, "2 * i + j % 2]", "i + 2 * (j % 2)]"),
        "sums of the other half": Bug(TILE, "acc[j / kPartJ]", "acc[1 - j / kPartJ]"),
        "the columns of some taps are not stored": Bug(
            BACKWARD_TILE, "taps * (Product::kJ / kMaxTapsAtOnce)", "taps * kPair"
        ),
    },
    harmless=Bug(BACKWARD, "    wgmma_commit();\n", "    wgmma_commit();\n    wgmma_commit();\n"),
)
