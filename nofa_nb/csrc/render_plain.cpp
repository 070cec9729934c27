// For every processor: vectors of 4, which compilers turn into what there is (SSE2, NEON) or into plain arithmetic.
#include "render_cpu.h"
#define LANES 4
#define SET plain
#include "render_kernel.h"
