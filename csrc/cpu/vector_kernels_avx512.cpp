// Of 32 registers the tile takes 24, a row of b two and an element of a one.
#define DYHEAD_VECTOR_BYTES 64
#define DYHEAD_TILE_ROWS 12
#define DYHEAD_TILE_VECTORS 2
#define DYHEAD_SET avx512
#include "vector_kernels.inc"
