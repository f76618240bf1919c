// What bindings pass to launchers: numpy arrays copied into guarded memory and back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/dispatch.h"
#include "guarded_memory.h"
#include "simt.h"

namespace dyhead::simt {

namespace py = pybind11;

// bfloat16 and float16 travel through numpy as uint16 bit patterns.
template <class T>
using numpy_t = std::conditional_t<is_half_v<T>, uint16_t, T>;

inline DType named_dtype(std::string_view name) {
  if (name == "float64") return DType::kFloat64;
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("expected float64, float32, bfloat16 or float16, got " +
                              std::string(name));
}

// An array in emulated device memory, aligned to 256 bytes as device allocations are.
template <class T>
class DeviceArray {
 public:
  using Array = py::array_t<numpy_t<T>>;

  // A copy of `source`, which must have T's dtype; made contiguous.
  static DeviceArray copy_of(const char* name, const py::array& source) {
    const auto expected = py::dtype::of<numpy_t<T>>();
    if (!source.dtype().is(expected) && !source.dtype().equal(expected)) {
      throw std::invalid_argument(std::string(name) + ": expected dtype " +
                                  std::string(py::str(expected)) + ", got " +
                                  std::string(py::str(source.dtype())));
    }
    DeviceArray array(name, {source.shape(), source.shape() + source.ndim()});
    const auto contiguous = py::array_t<numpy_t<T>, py::array::c_style>::ensure(source);
    std::memcpy(array.memory_->data(), contiguous.data(), array.memory_->bytes());
    return array;
  }

  // An output: poisoned, so that elements the kernel leaves out show.
  static DeviceArray poisoned(const char* name, std::vector<py::ssize_t> shape) {
    return DeviceArray(name, std::move(shape));
  }

  // For counters and sums that the launcher's contract wants zeroed.
  static DeviceArray zeros(const char* name, std::vector<py::ssize_t> shape) {
    DeviceArray array(name, std::move(shape));
    std::memset(array.memory_->data(), 0, array.memory_->bytes());
    return array;
  }

  T* data() const { return reinterpret_cast<T*>(memory_->data()); }
  py::ssize_t shape(size_t axis) const { return shape_.at(axis); }

  Array to_numpy() const {
    Array result(shape_);
    std::memcpy(result.mutable_data(), memory_->data(), memory_->bytes());
    return result;
  }

 private:
  DeviceArray(const char* name, std::vector<py::ssize_t> shape) : shape_(std::move(shape)) {
    constexpr size_t kAlignment = 256;
    const auto count = std::accumulate(shape_.begin(), shape_.end(), py::ssize_t{1},
                                       std::multiplies<py::ssize_t>());
    memory_ =
        std::make_unique<GuardedMemory>(name, static_cast<size_t>(count) * sizeof(T), kAlignment);
  }

  std::vector<py::ssize_t> shape_;
  std::unique_ptr<GuardedMemory> memory_;
};

// The outputs of a backward operator: poisoned arrays where they are wanted; where they are not,
// null for the kernels and None for Python.
class WantedArrays {
 public:
  // `flags` has 1 or 0 for each output, in the order of the calls of `add`.
  explicit WantedArrays(const std::vector<int>& flags) : flags_(flags) {}

  // Returns the address of element `skip`.
  template <class T>
  T* add(const char* name, std::vector<py::ssize_t> shape, py::ssize_t skip = 0) {
    if (flags_.at(outputs_.size()) == 0) {
      outputs_.emplace_back(name, [] { return py::none(); });
      return nullptr;
    }
    const auto array =
        std::make_shared<DeviceArray<T>>(DeviceArray<T>::poisoned(name, std::move(shape)));
    outputs_.emplace_back(name, [array] { return array->to_numpy(); });
    return array->data() + skip;
  }

  // By name, in order.
  py::dict to_numpy() const {
    py::dict result;
    for (const auto& [name, output] : outputs_) result[name] = output();
    return result;
  }

 private:
  std::vector<int> flags_;
  std::vector<std::pair<const char*, std::function<py::object()>>> outputs_;
};

// RuntimeError if a launcher returned an error.
inline void check_launch(const char* launcher, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(launcher) + " returned CUDA error " +
                           std::to_string(static_cast<int>(error)));
}

}  // namespace dyhead::simt
