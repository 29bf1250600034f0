// Included before the op layer (csrc/*.cpp) in the emulated build: there a tensor counts as one of the GPU unless it is fp64, which has kernels on the
// CPU only.
#pragma once
#include "torch_headers.h"

namespace c10::impl {
struct EmulatedGuard {
  struct Stream {
    void* native_handle() const { return nullptr; }
  };
  explicit EmulatedGuard(DeviceType) {}
  Stream getStream(Device) const { return {}; }
};
}

#define VirtualGuardImpl EmulatedGuard
#define is_cuda() dtype().name().compare("double")
