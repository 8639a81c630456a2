// A CUDA device for a build of PyTorch without CUDA: it has memory of its own in that of the host, computes with the
// kernels of the CPU, and refuses what a GPU refuses. Copies on side streams are done only when somebody waits for
// them, so that what is read too early has the wrong values. (The idea of a device in C++ is that of PyTorch's openreg.)
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <unistd.h>

#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>

using at::IValue;
using at::Tensor;
using Stack = torch::jit::Stack;
using Work = std::function<void()>;

namespace {
const c10::Device kGpu(c10::kCUDA, 0);
std::recursive_mutex device_mutex, doing_mutex;

#include "memory.h"

// Random numbers: a generator whose state can be exchanged, as recordings need it. A recording that failed on the device
// leaves its state unusable.

struct Numbers : c10::intrusive_ptr_target {
  at::Generator host = at::detail::createCPUGenerator(67280421310721ULL);
  bool is_recorded = false;
};

struct DeviceGenerator final : c10::GeneratorImpl {
  c10::intrusive_ptr<Numbers> numbers;
  explicit DeviceGenerator(c10::intrusive_ptr<Numbers> given)
      : c10::GeneratorImpl(kGpu, c10::DispatchKeySet(c10::DispatchKey::CUDA)), numbers(std::move(given)) {}
  c10::GeneratorImpl* host() const { return numbers->host.unsafeGetGeneratorImpl(); }
  void set_current_seed(uint64_t seed) override { host()->set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return host()->current_seed(); }
  uint64_t seed() override { return host()->seed(); }
  void set_state(const c10::TensorImpl& state) override { host()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host()->get_state(); }
  void graphsafe_set_state(const c10::intrusive_ptr<c10::GeneratorImpl>& other) override {
    numbers = static_cast<DeviceGenerator*>(other.get())->numbers;
  }
  c10::intrusive_ptr<c10::GeneratorImpl> graphsafe_get_state() const override {
    return c10::make_intrusive<DeviceGenerator>(numbers);
  }
  DeviceGenerator* clone_impl() const override {
    auto copy = c10::make_intrusive<Numbers>();
    copy->host = numbers->host.clone();
    return new DeviceGenerator(copy);
  }
};

at::Generator new_generator() { return at::make_generator<DeviceGenerator>(c10::make_intrusive<Numbers>()); }

const at::Generator& default_generator() {
  static const at::Generator generator = new_generator();
  return generator;
}

c10::intrusive_ptr<Numbers> numbers_of(const at::Generator& generator) {
  return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->numbers;
}

// Kernels of a CPU draw from the process's generator if they are given none: it has the device's state meanwhile.
void drawing_from(const c10::intrusive_ptr<Numbers>& numbers, const Work& work) {
  TORCH_CHECK(numbers->is_recorded == (pool_of_recording() != 0), "Offset increment outside graph capture encountered unexpectedly.");
  auto* process = at::detail::getDefaultCPUGenerator().unsafeGetGeneratorImpl();
  auto* device = numbers->host.unsafeGetGeneratorImpl();
  const auto before = process->get_state();
  process->set_state(*device->get_state());
  try {
    work();
  } catch (...) {
    process->set_state(*before);
    throw;
  }
  device->set_state(*process->get_state());
  process->set_state(*before);
}

// Streams: each is a queue of what was put off. The ordinary one, 0, does everything at once.

struct Queue {
  std::deque<Work> open;
  int64_t put = 0, done = 0;
};

struct Event {
  int64_t stream = 0, put = 0;
};

std::map<int64_t, Queue> queues;
int64_t last_stream = 0, put_off_so_far = 0;
thread_local int64_t current_stream = 0;

// Whoever does what was put off may need Python's lock, for a tensor that ends: so nobody waits here with it.
void finish(int64_t stream, int64_t count) {
  std::optional<py::gil_scoped_release> without_python;
  if (PyGILState_Check()) without_python.emplace();
  std::lock_guard<std::recursive_mutex> only_one(doing_mutex);
  while (true) {
    Work work;
    {
      std::lock_guard<std::recursive_mutex> lock(device_mutex);
      Queue& queue = queues[stream];
      if (queue.done >= count || queue.open.empty()) return;
      work = std::move(queue.open.front());
      queue.open.pop_front();
    }
    work();
    std::lock_guard<std::recursive_mutex> lock(device_mutex);
    queues[stream].done++;
  }
}

int64_t put_so_far(int64_t stream) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  return queues[stream].put;
}

void finish(int64_t stream) { finish(stream, put_so_far(stream)); }

void finish_all() {
  for (int64_t stream = 0; stream <= last_stream; stream++) finish(stream);
}

void put_off(int64_t stream, Work work) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  queues[stream].open.push_back(std::move(work));
  queues[stream].put++;
  put_off_so_far++;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, kGpu, id); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    std::lock_guard<std::recursive_mutex> lock(device_mutex);
    return stream(++last_stream);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = stream(current_stream);
    current_stream = next.id();
    return before;
  }
  void record(void** event, const c10::Stream& on, c10::DeviceIndex, c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> lock(device_mutex);
    if (*event == nullptr) *event = new Event();
    *static_cast<Event*>(*event) = {on.id(), queues[on.id()].put};
  }
  void block(void* event, const c10::Stream& waiting) const override {
    if (event == nullptr) return;
    const Event awaited = *static_cast<Event*>(event);
    const Work wait = [awaited] { finish(awaited.stream, awaited.put); };
    waiting.id() == 0 ? wait() : put_off(waiting.id(), wait);
  }
  bool queryEvent(void* event) const override {
    std::lock_guard<std::recursive_mutex> lock(device_mutex);
    return event == nullptr || queues[static_cast<Event*>(event)->stream].done >= static_cast<Event*>(event)->put;
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) finish(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->put);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void synchronizeStream(const c10::Stream& stream) const override { finish(stream.id()); }
  void synchronizeDevice(c10::DeviceIndex) const override { finish_all(); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::Device getDeviceFromPtr(void*) const override { return kGpu; }
  bool isPinnedPtr(const void* place) const override { return is_pinned(place); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  void deviceSynchronize(c10::DeviceIndex) const override { finish_all(); }
};

#include "computing.h"
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  static Hooks hooks;
  static at::CUDAHooksInterface* as_interface = &hooks;
  c10::SetAllocator(c10::kCUDA, &device_memory);
  *static_cast<void**>(dlsym(RTLD_DEFAULT, "emulated_hooks")) = as_interface;
  module.def("default_generator", [] { return default_generator(); });
  module.def("begin_to_use", &begin_to_use);
  module.def("is_used", [] { return is_begun && owner == getpid(); });
  module.def("ask", &ask);
  module.def("memory", [] { return std::make_tuple(used, peak, total); });
  module.def("set_total", [](int64_t bytes) { total = allowed = bytes; });
  module.def("set_share", [](double share) { allowed = int64_t(share * double(total)); });
  module.def("reset_peak", [] { peak = used; });
  module.def("pools", [] {
    std::map<int64_t, int64_t> sizes;
    for (const auto& [number, pool] : pools) sizes[number] = pool.most;
    return sizes;
  });
  module.def("end_pool", &end_pool);
  module.def("release_pool", &release_pool);
  module.def("synchronize", [] { finish_all(); });
  module.def("put_off", [] { return put_off_so_far; });
  module.def("waits", [] { return waits_so_far; });
  module.def("reaction", [] { return reaction; });
  module.def("set_reaction", [](int value) { reaction = value; });
  module.def("is_recording", &is_recorded);
  module.def("also_recorded", [](py::function work) {
    if (is_recorded()) recording->steps.push_back([work] { py::gil_scoped_acquire gil; work(); });
  });
  py::class_<Graph>(module, "Graph")
      .def(py::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay)
      .def("reset", &Graph::reset);
}
