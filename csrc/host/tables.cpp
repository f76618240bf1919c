#include "tables.h"

#define DYHEAD_NAME(name) " " #name

// The tables and read rules of this library, for dyhead_cuda/library.py.
extern "C" __attribute__((visibility("default"))) const char* dyhead_tables() {
  return "map" DYHEAD_MAP_FIELDS(DYHEAD_NAME) "; geometry" DYHEAD_GEOMETRY_FIELDS(
      DYHEAD_NAME) "; term" DYHEAD_TERM_FIELDS(DYHEAD_NAME) "; job" DYHEAD_JOB_FIELDS(DYHEAD_NAME)
                   "; level" DYHEAD_LEVEL_FIELDS(DYHEAD_NAME) "; rule" DYHEAD_READ_RULES(
                       DYHEAD_NAME);
}
