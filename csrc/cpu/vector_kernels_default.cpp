// As for AVX2: of 16 registers the tile takes 12.
#define DYHEAD_VECTOR_BYTES 16
#define DYHEAD_TILE_ROWS 6
#define DYHEAD_TILE_VECTORS 2
#define DYHEAD_SET default
#include "vector_kernels.inc"
