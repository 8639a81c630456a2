// Loaded before PyTorch (LD_PRELOAD): a build of PyTorch for CPUs is told here that there is an accelerator.
#include <dlfcn.h>

#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t { CPU = 0, CUDA = 1 };
}

// What CPU code asks about CUDA; set by device.cpp, until when PyTorch's own answers stand.
extern "C" {
__attribute__((visibility("default"))) void* emulated_hooks = nullptr;
}

namespace at {
struct CUDAHooksInterface;

namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType device) {
  return device == c10::DeviceType::CUDA;
}
}  // namespace accelerator

namespace detail {
__attribute__((visibility("default"))) const CUDAHooksInterface& getCUDAHooks() {
  if (emulated_hooks != nullptr) return *static_cast<const CUDAHooksInterface*>(emulated_hooks);
  using Ask = const CUDAHooksInterface& (*)();
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<Ask>(dlsym(torch, "_ZN2at6detail12getCUDAHooksEv"))();
}
}  // namespace detail
}  // namespace at
