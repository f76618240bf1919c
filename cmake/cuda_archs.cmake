# Which architectures the CUDA library is compiled for, and with which options of nvcc.

# What a build without DYHEAD_CUDA_ARCHS is for, as far as nvcc knows it: nvcc 12.8 is the first that knows 100 and 120.
set(DYHEAD_DEFAULT_ARCHS 80 86 89 90a 100 120)

# Puts into the variable that `result` names: `requested`, if it names any architecture, or else the default ones and
# those of the GPUs at hand, `local`, without what the compiler `nvcc` does not know.
function(dyhead_cuda_archs result nvcc requested local)
  execute_process(COMMAND "${nvcc}" --list-gpu-arch OUTPUT_VARIABLE listed RESULT_VARIABLE status ERROR_VARIABLE said)
  string(REGEX MATCHALL "[0-9]+" known "${listed}")
  if(NOT status EQUAL 0 OR NOT known)
    message(FATAL_ERROR "${nvcc} --list-gpu-arch: expected a list of architectures, got '${listed}${said}'")
  endif()
  set(archs "${requested}")
  if(NOT requested)
    set(archs ${DYHEAD_DEFAULT_ARCHS} ${local})
    list(REMOVE_DUPLICATES archs)
    list(SORT archs COMPARE NATURAL)
  endif()
  set(kept "")
  foreach(arch IN LISTS archs)
    if(NOT arch MATCHES "^([0-9]+)[af]?$")
      message(FATAL_ERROR "DYHEAD_CUDA_ARCHS: expected entries such as 80, 90a or 100f, got '${arch}'")
    endif()
    if(CMAKE_MATCH_1 IN_LIST known)
      list(APPEND kept "${arch}")
    elseif(requested)
      list(JOIN known ", " names)
      message(FATAL_ERROR "DYHEAD_CUDA_ARCHS: ${nvcc} does not know '${arch}', only ${names}: leave it out, or set "
                          "CUDACXX to an nvcc that knows it")
    endif()
  endforeach()
  if(NOT kept)
    message(FATAL_ERROR "${nvcc} knows none of '${archs}': set CUDACXX to a newer nvcc")
  endif()
  set(${result} "${kept}" PARENT_SCOPE)
endfunction()

# Puts the option that compresses machine code best into the variable that `result` names. Drivers of CUDA 12.3 and
# older, on which a build with an nvcc of 12 may run, cannot read what the newer option makes.
function(dyhead_compression result nvcc_version)
  if(nvcc_version VERSION_GREATER_EQUAL 13)
    set(${result} --compress-mode=size PARENT_SCOPE)
  else()
    set(${result} -Xfatbin=-compress-all PARENT_SCOPE)
  endif()
endfunction()
