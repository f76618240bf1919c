# Which of torch's C++ interfaces the libraries are compiled against.

# The oldest torch whose stable ABI has all that the sources use, and the oldest whose classic interface has.
set(DYHEAD_STABLE_TORCH 2.10)
set(DYHEAD_MINIMUM_TORCH 2.4)

# Sets, for the torch package in `directory`:
#   dyhead_interface                 `requested` (stable or classic), or if that is empty what this torch has
#   dyhead_interface_torch           version that the libraries need: at least that, or with "classic" exactly
#   dyhead_interface_definitions, dyhead_interface_options, dyhead_interface_libraries
#   dyhead_interface_cuda_libraries  what the CUDA library needs besides
macro(dyhead_torch_interface directory requested)
  set(dyhead_torch_version "")
  if(EXISTS "${directory}/version.py")
    file(STRINGS "${directory}/version.py" dyhead_torch_line REGEX "^__version__ = ")
    string(REGEX MATCH "[0-9]+\\.[0-9]+" dyhead_torch_version "${dyhead_torch_line}")
  endif()
  if(NOT dyhead_torch_version)
    message(FATAL_ERROR "DYHEAD_TORCH_DIR: expected the directory of a torch package, got '${directory}'; "
                        "pass -DDYHEAD_TORCH_DIR=<site-packages>/torch")
  endif()
  if(dyhead_torch_version VERSION_LESS DYHEAD_MINIMUM_TORCH)
    message(FATAL_ERROR "expected torch >= ${DYHEAD_MINIMUM_TORCH}, got ${dyhead_torch_version} in ${directory}")
  endif()
  if("${requested}" STREQUAL "classic" OR
     ("${requested}" STREQUAL "" AND dyhead_torch_version VERSION_LESS DYHEAD_STABLE_TORCH))
    if(APPLE)
      message(FATAL_ERROR "expected torch >= ${DYHEAD_STABLE_TORCH} on macOS, got ${dyhead_torch_version} in "
                          "${directory}: the interface of older ones needs OpenMP, which Apple's compiler lacks")
    endif()
    set(dyhead_interface classic)
    set(dyhead_interface_torch "${dyhead_torch_version}")
    set(dyhead_interface_definitions DYHEAD_CLASSIC_TORCH)
    # at::parallel_for is a template with OpenMP in it. Its functions come from the library that torch has loaded.
    set(dyhead_interface_options -fopenmp)
    set(dyhead_interface_libraries c10)
    set(dyhead_interface_cuda_libraries c10_cuda)
    # Wheels before torch 2.6 have the strings of the old C++ ABI, and say so here.
    file(STRINGS "${directory}/share/cmake/Torch/TorchConfig.cmake" dyhead_torch_line REGEX "_GLIBCXX_USE_CXX11_ABI=")
    string(REGEX MATCH "_GLIBCXX_USE_CXX11_ABI=[01]" dyhead_torch_line "${dyhead_torch_line}")
    list(APPEND dyhead_interface_definitions ${dyhead_torch_line})
  elseif("${requested}" MATCHES "^(|stable)$")
    if(dyhead_torch_version VERSION_LESS DYHEAD_STABLE_TORCH)
      message(FATAL_ERROR "DYHEAD_TORCH_INTERFACE=stable: expected torch >= ${DYHEAD_STABLE_TORCH}, "
                          "got ${dyhead_torch_version} in ${directory}")
    endif()
    set(dyhead_interface stable)
    set(dyhead_interface_torch "${DYHEAD_STABLE_TORCH}")
    set(dyhead_interface_definitions TORCH_TARGET_VERSION=0x020a000000000000)
    set(dyhead_interface_options "")
    set(dyhead_interface_libraries "")
    set(dyhead_interface_cuda_libraries "")
  else()
    message(FATAL_ERROR "DYHEAD_TORCH_INTERFACE: expected stable, classic or nothing, got '${requested}'")
  endif()
endmacro()
