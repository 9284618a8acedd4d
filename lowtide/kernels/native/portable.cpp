// The kernels for portable; see kernels.inc.

#include "kernels.h"

#define LOWTIDE_SET portable
#define LOWTIDE_WIDTH 128
#define LOWTIDE_VNNI 0
#include "kernels.inc"
