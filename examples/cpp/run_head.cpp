// Runs an AOTInductor package of a head on a random pyramid, without Python:
//
//   run_head LIBDYHEAD_CPU.SO PACKAGE.PT2 CHANNELS LEVELS
//
// docs/export.md says how to make the package and how to compile this.
#include <ATen/ops/randn.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_head LIBDYHEAD_CPU.SO PACKAGE.PT2 CHANNELS LEVELS\n";
    return 2;
  }
  // The library registers the operators dyhead::... when it is loaded.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader head(argv[2]);
  const int channels = std::atoi(argv[3]);
  std::vector<at::Tensor> levels;
  for (int level = 0; level < std::atoi(argv[4]); ++level) {
    const int side = 64 >> level;
    levels.push_back(at::randn({1, channels, side, side}));
  }
  for (const at::Tensor& level : head.run(levels)) std::cout << level.sizes() << '\n';
}
