#include "tables.h"

#define DYHEAD_NAME(name) " " #name

// The tables, read rules and modes of this library, for dyhead_cuda/library.py.
// clang-format off
extern "C" __attribute__((visibility("default"))) const char* dyhead_tables() {
  return "size" DYHEAD_SIZE_FIELDS(DYHEAD_NAME)
         "; geometry" DYHEAD_GEOMETRY_FIELDS(DYHEAD_NAME)
         "; term" DYHEAD_TERM_FIELDS(DYHEAD_NAME)
         "; job" DYHEAD_JOB_FIELDS(DYHEAD_NAME)
         "; level" DYHEAD_LEVEL_FIELDS(DYHEAD_NAME)
         "; rule" DYHEAD_READ_RULES(DYHEAD_NAME)
         "; upsample" DYHEAD_UPSAMPLE_MODES(DYHEAD_NAME);
}
// clang-format on
