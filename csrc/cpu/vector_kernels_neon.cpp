// Every aarch64 has NEON. Of 32 registers the tile takes 24, a row of b four, and elements of a the
// rest: a multiplication reads one from a lane, so they need no broadcast.
#define DYHEAD_VECTOR_BYTES 16
#define DYHEAD_TILE_ROWS 6
#define DYHEAD_TILE_VECTORS 4
#define DYHEAD_SET neon
#include "vector_kernels.inc"
