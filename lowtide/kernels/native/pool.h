// Threads that share the chunks of one kernel. Chunks are taken one by one from a counter, so a
// thread that the machine holds up delays the others by one chunk at most.

#pragma once
#include <cstdint>

namespace lowtide {

using Body = void (*)(void* arguments, int64_t chunk, int thread);

class Team;

// Runs body(arguments, chunk, thread) for each chunk in 0 .. chunks - 1.
void parallel(Team& team, int64_t chunks, Body body, void* arguments);

int threads_of(const Team& team);

// Memory of one thread that is kept between calls, aligned to 64 bytes; null if there is none left.
uint8_t* scratch_of(Team& team, int thread, int64_t bytes);

// Adds bits to what the run returns.
void report(Team& team, int32_t outcome);

template <class F>
void for_chunks(Team& team, int64_t chunks, F& body) {
  parallel(
      team, chunks,
      [](void* f, int64_t chunk, int thread) { (*static_cast<F*>(f))(chunk, thread); }, &body);
}

}  // namespace lowtide
