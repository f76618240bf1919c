// What the other files of the emulation ask of the scheduler.
#pragma once

#include <cstddef>
#include <string>

#include "block.h"

namespace dyhead::simt {

// What a thread waits for.
class Waiting {
 public:
  virtual ~Waiting() = default;
  // For deadlock reports.
  virtual std::string describe() const = 0;
  // Whether it is over; asked again and again, at random times.
  virtual bool over() { return false; }
};

// Drawn from the seeded generator, in [0, bound).
unsigned random_below(size_t bound);

bool same(const Where& a, const Where& b);

// Suspends the running thread until make_ready(); `waiting` is only described.
void block_thread(Waiting& waiting, Where where);
// Suspends the running thread until `waiting` is over.
void poll_thread(Waiting& waiting, Where where);
void make_ready(Thread& thread);
// Sometimes lets others run first.
void may_switch(Where where);
// Lets others run so many times, unless there are none.
void let_others_run(unsigned turns, Where where);

template <class Payload>
void collect(const char* name, unsigned mask, bool aligned,
             void (*complete)(void* const (&payloads)[kLanes]), Payload& payload, Where where) {
  Collective collective{.name = name,
                        .mask = mask,
                        .where = where,
                        .aligned = aligned,
                        .complete = complete,
                        .payload = &payload};
  warp_collective(collective);
}

}  // namespace dyhead::simt
