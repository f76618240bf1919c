// The CUDA runtime's types and functions, or the emulation's in their place.
#pragma once

#if defined(DYHEAD_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif
