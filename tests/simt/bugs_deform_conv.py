"""Planted bugs of `deform_conv`, `offset_deform_conv` and of the sort that they use."""

from __future__ import annotations

from .planted import BARRIER, COMMON, CUDA, Bug, Suite, without

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
DEFORM_FINISH = f"{CUDA}/deform_conv/deform_conv_fwd_finish.cuh"
DEFORM_SAMPLER = f"{CUDA}/deform_conv/deform_conv_gather.cuh"
DEFORM_MOMENTS = f"{CUDA}/deform_conv/deform_conv_moments.cuh"
DEFORM_INPUT = f"{CUDA}/deform_conv/deform_conv_bwd_input.cuh"
DEFORM_SAMPLES = f"{CUDA}/deform_conv/deform_conv_samples.cuh"
DEFORM_WALK = f"{CUDA}/deform_conv/deform_conv_walk.cuh"
DEFORM_GATHER = f"{CUDA}/deform_conv/deform_conv_bwd_gather.cu"
INPUT_KERNEL = "deform_conv_bwd_input_float32"
ALL_JOBS = "test_jobs and all and float32"
ALL_JOBS_BACKWARD = "test_jobs_backward and all and float32"
SAMPLES_THERE = "    // The samples are staged, and the buffers of the previous stretch are free.\n"
OPERANDS_THERE = (
    "      // Both operands of this step are ready; the buffers of the previous step are free.\n"
)

DEFORM_CONV = Suite(
    tests="test_deform_conv.py",
    kernel="deform_conv_fwd_float32",
    select="test_convolutions and vectors and float32"
    " or test_blocks_share_the_tiles_of_the_last_round and float32 and 200",
    bugs={
        "parts added before all are there": Bug(
            DEFORM_FINISH,
            "arrive_is_last<Threads>(p_.parts_arrived + at_.shared, parts)",
            "arrive_is_last<Threads>(p_.parts_arrived + at_.shared, parts - 1)",
        ),
        "parts added in the order of arrival": Bug(
            DEFORM_FINISH,
            "sum + *part_sum(part, i * Product::kJ + j);",
            "sum + *part_sum((part + at_.part) % parts, i * Product::kJ + j);",
        ),
        "a part's last tap is another's too": Bug(
            DEFORM_FINISH,
            "taps * (at.part + 1) / parts",
            "(taps * (at.part + 1) + parts - 1) / parts",
        ),
        # Of later terms: what is in memory before the first one is no place to read.
        "samples read before they are there": Bug(
            DEFORM_FORWARD,
            f"{SAMPLES_THERE}    {BARRIER}\n",
            f"{SAMPLES_THERE}    if (sampler.job.terms == 1 || &term == &launch_.terms"
            f"[sampler.job.first_term]) {BARRIER}\n",
            select=ALL_JOBS,
        ),
        "predictions used before they are there": without(
            DEFORM_SAMPLER, "    cp_async_wait_all();\n"
        ),
        "a corner beyond the border is read": Bug(
            DEFORM_SAMPLER, "if (second < size)", "if (second <= size)"
        ),
        "the pixel at the border has its whole weight twice": Bug(
            DEFORM_SAMPLER, "{{fraction / F(2), fraction / F(2)}", "{{fraction, fraction}"
        ),
        "samples outside read the first pixel": Bug(
            DEFORM_SAMPLER,
            "F(0)}, {0, 1, 1, 0}}",
            "F(0)}, {0, 0, 0, 0}}",
            select="test_convolutions and far and float32",
        ),
        "units beyond the last channel read on": Bug(
            DEFORM_FORWARD,
            "if (left() <= 0) source",
            "if (left() > channels) source",
            "deform_conv_fwd_float16",
            "few_channels and float16",
        ),
        "steps multiply other units": Bug(
            f"{CUDA}/tile/tile_gemm.cuh",
            "unit_offset(0, 2 * step)",
            "unit_offset(0, step)",
            "deform_conv_fwd_float16",
            "test_convolutions and vectors and float16",
        ),
        "the last group of tiles is not merged": Bug(
            DEFORM_MOMENTS,
            "merge_moments<F>(merged, groups,",
            "merge_moments<F>(merged, groups - 1,",
            select="several_groups and float32",
        ),
        "a group's upsampled mean is not around its own mean": without(
            DEFORM_MOMENTS,
            "  sum.up -= sum.up_weight * sum.mean;\n",
            select="several_groups and float32",
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
            DEFORM_FINISH,
            "valid[row] = at.index < 0 ? F(0) : F(1);",
            "valid[row] = F(1);",
            select=ALL_JOBS,
        ),
        "moments of the values before they are rounded": Bug(
            DEFORM_FINISH,
            "to_compute(from_compute<T>(product_.at(i, j)))",
            "product_.at(i, j)",
            "deform_conv_fwd_bfloat16",
            "test_one_value_is_its_own_mean and bfloat16",
        ),
        "moments of a tile not weighted by its pixels": Bug(
            DEFORM_MOMENTS,
            "const F share = added / (sum.count + added);",
            "const F share = F(1) / (sum.count / added + F(2));",
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
            DEFORM_FINISH,
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
            DEFORM_SAMPLER,
            "return {{weight, F(0), F(0), F(0)},",
            "return {{F(0), F(0), F(0), F(0)},",
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

PLAIN_FORWARD = f"{CUDA}/deform_conv/plain_conv_fwd.cuh"
PLAIN_BARRIER = (
    "        // Both operands are ready; the buffers of the previous column are free.\n"
    f"        {BARRIER}\n"
)
HALO_COPY = "to + halo_offset(row, row % kHaloWidth, unit), at"

PLAIN_CONV = Suite(
    tests="test_plain_conv.py",
    kernel="plain_conv_fwd_bfloat16",
    select="test_plain_convolutions and (predicting or padded or groups or finite) and bfloat16",
    bugs={
        "a tile's place read before it is there": Bug(
            PLAIN_FORWARD,
            f"    {BARRIER}\n    const MapShape& map",
            "    const MapShape& map",
        ),
        "the halo's pixels read before they are there": Bug(
            PLAIN_FORWARD,
            f"    }}\n    {BARRIER}\n  }}\n\n  DYHEAD_DEVICE void run",
            "    }\n  }\n\n  DYHEAD_DEVICE void run",
        ),
        "operands read before they are there": without(PLAIN_FORWARD, PLAIN_BARRIER),
        "copies not waited for": without(PLAIN_FORWARD, "        cp_async_wait_all();\n"),
        "the halo that is being read is written": Bug(
            PLAIN_FORWARD, "halo_buffer ^= 1;", "halo_buffer ^= 0;"
        ),
        "the panels that are being read are written": Bug(
            PLAIN_FORWARD, "weights_buffer ^= 1;", "weights_buffer ^= 0;"
        ),
        "panels of the first step for all": without(
            PLAIN_FORWARD, "          panels += kPlainTaps * kPlainTaps * kPanel;\n"
        ),
        "panels of a kernel row for those of a column": Bug(
            PLAIN_FORWARD, "from + dy * kPlainTaps * kPanel", "from + dy * kPanel"
        ),
        "sums stored where operands are read": Bug(
            PLAIN_FORWARD, f"    {BARRIER}\n    finish();\n", "    finish();\n"
        ),
        "sums read before they are there": without(
            PLAIN_FORWARD, f"    {BARRIER}\n", "      }\n    }\n"
        ),
        "pixels outside are the map's first": Bug(
            PLAIN_FORWARD, "at, exists ? 16 : 0)", "at, left > 0 ? 16 : 0)"
        ),
        "pixels beyond the right border are the next row's": Bug(
            PLAIN_FORWARD, "x >= 0 && x < map.width", "x >= 0 && x <= map.width"
        ),
        "channels beyond the last one are read": Bug(
            PLAIN_FORWARD, "first != kOutside && left > 0", "first != kOutside"
        ),
        "the last step takes all channels to exist": without(
            PLAIN_FORWARD, "      left -= depth;\n"
        ),
        "a third of the halo is not copied": Bug(
            PLAIN_FORWARD, "(part * kTimes + i) * kRows", "(part % 2 * kTimes + i) * kRows"
        ),
        "a halo's rows are as wide as a patch": Bug(
            PLAIN_FORWARD,
            "a_row + row * kHaloWidth * kRowBytes",
            "a_row + row * kPatchWidth * kRowBytes",
        ),
        "all taps of a row read the first one's pixels": Bug(
            PLAIN_FORWARD, "const int x = dx + lane() % 16;", "const int x = lane() % 16;"
        ),
        "units permuted by row where they are read by x": Bug(
            PLAIN_FORWARD, HALO_COPY, HALO_COPY.replace("row % kHaloWidth", "row")
        ),
        "the paddings are exchanged": Bug(
            PLAIN_FORWARD, "at_.y - launch.shape.pad_h", "at_.y - launch.shape.pad_w"
        ),
        "the first group's channels for all": Bug(
            PLAIN_FORWARD, "at_.group * group_channels + first", "first"
        ),
        "a slice of the depth is not added": Bug(PLAIN_FORWARD, "i < kSlices;", "i < kSlices - 1;"),
        "pixels beyond the map are stored": Bug(
            PLAIN_FORWARD, "if (x < width) out", "if (x <= width) out"
        ),
        "TF32 truncated": Bug(
            PLAIN_FORWARD,
            "if (dx == 0) round_halo(",
            "if (dx == 3) round_halo(",
            "plain_conv_fwd_tf32",
            "test_tf32_of_plain_convolutions_is_rounded",
        ),
        "another halo is rounded": Bug(
            PLAIN_FORWARD,
            "round_halo(halo + halo_buffer * kHalo)",
            "round_halo(halo)",
            "plain_conv_fwd_tf32",
            "test_tf32_of_plain_convolutions_is_rounded",
        ),
    },
    harmless=Bug(PLAIN_FORWARD, PLAIN_BARRIER, f"{PLAIN_BARRIER}        {BARRIER}\n"),
)

DEFORM_WEIGHTS_KERNEL = f"{CUDA}/deform_conv/deform_conv_bwd_weights.cuh"
ADD_WEIGHTS = f"{CUDA}/deform_conv/deform_conv_add_weights.cu"

DEFORM_WEIGHTS = Suite(
    tests="test_deform_weights.py",
    kernel="deform_conv_bwd_weights_bfloat16",
    select="test_slices_give and 30 or test_several_launches and bfloat16 or test_every_order"
    " or test_plain_samples_are_copied and bfloat16",
    bugs={
        "slots of other taps share samples": Bug(
            DEFORM_WEIGHTS_KERNEL, "work_.slots[located - 1].tap == slot.tap &&", ""
        ),
        "plain samples outside the map not cleared": Bug(
            DEFORM_WEIGHTS_KERNEL, "from, inside ? 16 : 0);", "from, 16);"
        ),
        "plain samples copied over those that are multiplied": Bug(
            DEFORM_WEIGHTS_KERNEL,
            "copy_samples(b_ + buffer * Shared::kB, next)",
            "copy_samples(b_ + (buffer ^ 1) * Shared::kB, next)",
        ),
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

# ---- offset_deform_conv: how its two calls share a launch and the sums of one gradient ----------

DEFORM_PACK = f"{CUDA}/deform_conv/deform_conv_pack.cu"
DEFORM_RUN = f"{CUDA}/deform_conv/deform_conv_run.h"
INPUT_RUN = f"{CUDA}/deform_conv/deform_conv_bwd_input_run.h"
RUN_CALL = "error = run_bwd_pass(steps[i], scatter, stream);"

OFFSET_DEFORM_CONV = Suite(
    tests="test_offset_deform_conv.py",
    kernel="offset_deform_conv",
    select="test_equals_two_calls and all and float64",
    bugs={
        "sums cleared by each call": Bug(
            INPUT_RUN,
            RUN_CALL,
            "packs[i].set.zeros[0] = {sums.values, sums.words};\n"
            "error = pack_weights({&packs[i], 1}, steps[i].math, stream);\n"
            f"if (error == cudaSuccess) {RUN_CALL}",
        ),
        "sums cleared by no call": Bug(
            INPUT_RUN,
            "packs.empty() ? sums : DeformBwdSums{}",
            "DeformBwdSums{}",
        ),
        "the branches packed from the first matrices of the launch": Bug(
            DEFORM_PACK, "p.weights + set.first_pointer", "p.weights"
        ),
        "biases of the first matrices of the launch": Bug(
            DEFORM_PACK, "p.bias[set.first_pointer + at / outputs]", "p.bias[at / outputs]"
        ),
        "the branches' first columns are not packed": Bug(DEFORM_PACK, "    item -= items;\n", ""),
        "a second launch packs over what the first has packed": Bug(
            DEFORM_RUN,
            "set.first_matrix = first;",
            "set.first_matrix = 0;",
            select="test_several_launches_pack and float64",
        ),
        "finished before the offset convolution has added": Bug(
            INPUT_RUN, "i < steps.size() && error", "i + 1 < steps.size() && error"
        ),
        "the offset convolution adds to another map": Bug(
            f"{COMMON}/deform_jobs.h", "t.terms.push_back({i, 0});", "t.terms.push_back({0, 0});"
        ),
        "the offset convolution adds in other steps": Bug(
            INPUT_RUN,
            "step.input.sum_bits = sums.bits;",
            "step.input.sum_bits = sums.bits + (&step == &steps.front() ? 0 : 1);",
            select="test_deterministic or test_equals_the_reference and deterministic and float64",
        ),
        "the offset convolution is not measured": Bug(
            INPUT_RUN,
            RUN_CALL,
            "const bool skip = i > 0 && scatter == Scatter::kMeasure;\n"
            "error = run_bwd_pass(steps[i], skip ? Scatter::kNone : scatter, stream);",
            select="test_calls_of_different_sizes and float32",
        ),
        "the second pass gathers again": Bug(
            INPUT_RUN,
            "if (error == cudaSuccess && !again) error = gather",
            "if (error == cudaSuccess) error = gather",
            select="test_equals_the_reference and all and deterministic and float64",
        ),
    },
    harmless=Bug(INPUT_RUN, "scatter == Scatter::kFixed;", "Scatter::kFixed == scatter;"),
)
