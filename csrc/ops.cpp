// The schemas of all operators, and nothing else. Kernels register beside their code, per device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dyhead, m) {
  // rows [N, P, C]; parameters in the compute type. Returns out, mean [N, C], hidden [N, H] and
  // logits [N, 4 C].
  m.def(
      "dynamic_relu_fwd(Tensor rows, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
      "Tensor fc2_bias, bool hard_sigmoid) -> (Tensor, Tensor, Tensor, Tensor)");
  // Returns the gradients of rows, of the logits [N, 4 C] and of the hidden layer before its ReLU
  // [N, H]; those of the parameters are products of these with what the forward returned.
  m.def(
      "dynamic_relu_bwd(Tensor grad_out, Tensor rows, Tensor hidden, Tensor logits, "
      "Tensor fc1_weight, Tensor fc2_weight, bool hard_sigmoid) -> (Tensor, Tensor, Tensor)");
  // Any list of deformable jobs (csrc/common/deform_jobs.h). Returns the output rows and, where
  // `moments` is set, mean, biased variance and upsampled mean per job, image and channel. The rows
  // have the source's type, or the compute type where `out_in_compute_dtype` is set.
  m.def(
      "deform_conv_fwd(Tensor source, Tensor predictions, Tensor[] weights, Tensor[] bias, "
      "Tensor? gates, int[] geometry, int[] sources, int[] terms, int[] jobs, bool mask_logits, "
      "bool out_in_compute_dtype, bool moments, bool allow_tf32) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // Returns the gradients of source, predictions, weights, bias and gates; those of weights and
  // bias are stacked and of the compute type, the last two are empty where they do not exist.
  m.def(
      "deform_conv_bwd(Tensor grad_out, Tensor? grad_mean, Tensor? grad_var, "
      "Tensor? grad_up_mean, Tensor source, Tensor predictions, Tensor[] weights, Tensor? gates, "
      "Tensor out, Tensor mean, int[] geometry, int[] sources, int[] terms, int[] jobs, "
      "bool mask_logits, bool out_in_compute_dtype, bool with_bias, bool allow_tf32, bool "
      "deterministic) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Upsampled branches, scaled and added, through the dynamic ReLU (csrc/common/fuse_branches.h).
  m.def(
      "fuse_branches_fwd(Tensor y, Tensor scale, Tensor shift, Tensor coefficients, int images, "
      "int[] maps, int[] levels) -> Tensor");
  // Returns the gradients of y, scale, shift and coefficients.
  m.def(
      "fuse_branches_bwd(Tensor grad_out, Tensor y, Tensor scale, Tensor shift, "
      "Tensor coefficients, int images, int[] maps, int[] levels) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  // From the moments of a block's branches to what fuse_branches takes
  // (csrc/common/block_coefficients.h). Parameters of any floating type, everything else in the
  // compute type. Returns scale, shift and coefficients, and for the backward norms [J, N, 2 G + 1]
  // and layers [L, N, 5 C + H].
  m.def(
      "block_coefficients_fwd(Tensor mean, Tensor var, Tensor up_mean, Tensor[] norm_weights, "
      "Tensor[] norm_biases, Tensor gate_weight, Tensor gate_bias, Tensor fc1_weight, "
      "Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, int[] job_levels, int[] job_branches, "
      "int num_groups, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Returns the gradients of mean, var, up_mean, of all norm_weights and norm_biases, stacked, and
  // of the other parameters in the order above, all in the compute type.
  m.def(
      "block_coefficients_bwd(Tensor grad_scale, Tensor grad_shift, Tensor grad_coefficients, "
      "Tensor mean, Tensor up_mean, Tensor norms, Tensor layers, Tensor[] norm_weights, "
      "Tensor[] norm_biases, Tensor gate_weight, Tensor fc1_weight, Tensor fc2_weight, "
      "int[] job_levels, int[] job_branches, int num_groups) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Levels [N, C, H, W], each contiguous or channels_last, as rows [R, C], one after the other.
  m.def("pack_levels(Tensor[] levels) -> Tensor");
  // Contiguous levels from their rows: first row, height and width of each.
  m.def("unpack_levels(Tensor rows, int images, int[] maps) -> Tensor[]");
}
