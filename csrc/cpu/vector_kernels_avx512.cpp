#define DYHEAD_VECTOR_BYTES 64
#define DYHEAD_TILE_ROWS 12
#define DYHEAD_SET avx512
#include "vector_kernels.inc"
