// Of 16 registers the tile takes 12, a row of b two and an element of a one.
#define DYHEAD_VECTOR_BYTES 32
#define DYHEAD_TILE_ROWS 6
#define DYHEAD_TILE_VECTORS 2
#define DYHEAD_SET avx2
#include "vector_kernels.inc"
