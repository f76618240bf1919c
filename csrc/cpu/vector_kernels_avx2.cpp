#define DYHEAD_VECTOR_BYTES 32
#define DYHEAD_TILE_ROWS 6
#define DYHEAD_SET avx2
#include "vector_kernels.inc"
