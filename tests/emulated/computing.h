// Included by device.cpp: how every operation on the device is computed, recorded and replayed.

struct Recording {
  int64_t stream, pool;
  std::thread::id thread;
  c10::intrusive_ptr<Numbers> numbers;
  std::vector<Work> steps;
  bool is_broken = false, has_ended = false;
};

std::shared_ptr<Recording> recording;
int64_t waits_so_far = 0;
int reaction = 0;  // to a wait, as `torch.cuda.set_sync_debug_mode`: 0 nothing, 1 warns, 2 raises

bool is_recorded() { return recording && recording->stream == current_stream; }

int64_t pool_of_recording() { return is_recorded() ? recording->pool : 0; }

struct Graph {
  std::shared_ptr<Recording> recorded;
  void begin(int64_t pool) {
    TORCH_CHECK(!recording, "another recording is under way");
    TORCH_CHECK(current_stream != 0, "CUDA graphs must be captured on a non-default stream.");
    TORCH_CHECK(taken_from.insert(pool).second, "beginAllocateToPool: already recording to mempool_id");
    pools[pool].users++;
    const auto numbers = numbers_of(default_generator());
    numbers->is_recorded = true;
    recorded = recording = std::make_shared<Recording>(Recording{current_stream, pool, std::this_thread::get_id(), numbers});
  }
  void end() {
    TORCH_CHECK(recording && recording == recorded, "this recording is not under way");
    recording.reset();
    TORCH_CHECK(!recorded->is_broken, "CUDA error: operation failed due to a previous error during capture");
    end_pool(recorded->pool);
    recorded->numbers->is_recorded = false;
    recorded->has_ended = true;
  }
  void replay() {
    TORCH_CHECK(recorded && recorded->has_ended, "nothing was recorded");
    TORCH_CHECK(!is_recorded(), "a replay cannot be recorded");
    for (const Work& step : recorded->steps) step();
  }
  void reset() {
    if (recorded && recorded->has_ended) release_pool(recorded->pool);
    recorded.reset();
  }
  ~Graph() { reset(); }
};

// While something is recorded, nothing of its stream and nothing in its thread may wait; other threads may.
void wait_for_device(const std::string& name) {
  waits_so_far++;
  const bool is_refused = is_recorded() || (recording && recording->thread == std::this_thread::get_id());
  if (is_refused) recording->is_broken = true;
  TORCH_CHECK(!is_refused, "CUDA error: operation not permitted when stream is capturing (", name, ")");
  TORCH_CHECK(reaction != 2, "called a synchronizing CUDA operation (", name, ")");
  if (reaction == 1) TORCH_WARN("called a synchronizing CUDA operation (", name, ")");
  finish(current_stream);
}

// Tensors of the device as tensors of the host with the same memory, and back. A result that is a view, or the tensor
// that an operation was given, is found again; what an operation resized has its new memory afterwards.
class Lent {
 public:
  Tensor to_host(const Tensor& tensor) {
    auto* own = tensor.storage().unsafeGetStorageImpl();
    auto found = lent_.find(own);
    if (found == lent_.end()) {
      auto drop = [](void* context) { delete static_cast<c10::Storage*>(context); };
      c10::DataPtr memory(own->mutable_data(), new c10::Storage(tensor.storage()), drop, c10::Device(c10::kCPU));
      c10::Storage host({}, own->nbytes(), std::move(memory), c10::GetAllocator(c10::kCPU), true);
      found = lent_.emplace(own, host).first;
      owner_.emplace(host.unsafeGetStorageImpl(), tensor.storage());
    }
    const Tensor host = like(tensor, found->second, c10::DispatchKey::CPU);
    pairs_.emplace_back(host, tensor);
    return host;
  }

  Tensor to_device(const Tensor& result) {
    if (!result.defined() || !result.device().is_cpu()) return result;
    for (const auto& [host, tensor] : pairs_)
      if (host.is_same(result)) return tensor;
    auto* storage = result.storage().unsafeGetStorageImpl();
    auto found = owner_.find(storage);
    if (found == owner_.end()) found = owner_.emplace(storage, counted(result)).first;
    return like(result, found->second, c10::DispatchKey::CUDA);
  }

  bool is_new(const Tensor& result) const { return owner_.count(result.storage().unsafeGetStorageImpl()) == 0; }

  void take_sizes() {
    for (const auto& [host, tensor] : pairs_) {
      auto* own = tensor.storage().unsafeGetStorageImpl();
      if (host.storage().mutable_data() != own->mutable_data() || host.storage().nbytes() != own->nbytes()) {
        const c10::Storage grown = counted(host);
        own->set_nbytes(grown.nbytes());
        own->set_data_ptr_noswap(std::move(grown.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      }
      if (host.sizes() != tensor.sizes() || host.strides() != tensor.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

 private:
  struct Counted {
    c10::Storage storage;
    int64_t bytes, pool;
  };

  static Tensor like(const Tensor& tensor, const c10::Storage& storage, c10::DispatchKey key) {
    const c10::InferenceMode as_it_is(tensor.is_inference());
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), tensor.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
    made._set_conj(tensor.is_conj());
    made._set_neg(tensor.is_neg());
    return made;
  }

  static c10::Storage counted(const Tensor& host) {
    auto* storage = host.storage().unsafeGetStorageImpl();
    const int64_t bytes = storage->nbytes();
    const int64_t pool = take(bytes);
    auto drop = [](void* context) {
      auto* counted = static_cast<Counted*>(context);
      give_back(counted->bytes, counted->pool);
      delete counted;
    };
    c10::DataPtr memory(storage->mutable_data(), new Counted{host.storage(), bytes, pool}, drop, kGpu);
    return c10::Storage({}, bytes, std::move(memory), &device_memory, true);
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> lent_, owner_;
  std::vector<std::pair<Tensor, Tensor>> pairs_;  // of the host, of the device
};

void each_tensor(const IValue& value, const std::function<void(const Tensor&)>& use) {
  if (value.isTensor() && value.toTensor().defined()) use(value.toTensor());
  if (value.isList())
    for (const IValue& each : value.toListRef()) each_tensor(each, use);
}

IValue converted(const IValue& value, const std::function<Tensor(const Tensor&)>& convert) {
  if (value.isTensor()) return convert(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& each : value.toTensorVector()) list.push_back(convert(each));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& each : value.toOptionalTensorList())
      list.push_back(each ? std::optional<Tensor>(convert(*each)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
  if (value.isGenerator() && value.toGenerator().device().is_cuda()) return numbers_of(value.toGenerator())->host;
  return value;
}

const std::set<std::string> kIndexing{"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"};
const std::set<std::string> kWaiting{
    "aten::_local_scalar_dense", "aten::equal",       "aten::is_nonzero",          "aten::nonzero",
    "aten::masked_select",       "aten::_unique2",    "aten::unique_consecutive",  "aten::unique_dim",
    "aten::bincount",            "aten::repeat_interleave.Tensor"};
const std::set<std::string> kVarying{"aten::avg_pool3d_backward", "aten::put_"};  // by any variant

// With rows, many releases of PyTorch copy strides from main memory for these where they add in order.
const std::set<std::string> kStriding{"aten::scatter_add", "aten::scatter_add_", "aten::scatter_add.out", "aten::scatter.src_out"};

bool waits(const std::string& name, const std::vector<IValue>& given) {
  if (kStriding.count(name)) return at::globalContext().deterministicAlgorithms() && given[0].toTensor().dim() > 1;
  if (name == "aten::copy_") {
    const Tensor &to = given[0].toTensor(), &from = given[1].toTensor();
    if (to.is_cuda() == from.is_cuda()) return false;
    return !(given[2].toBool() && is_pinned((to.is_cuda() ? from : to).data_ptr()));
  }
  bool found = kWaiting.count(name) != 0;
  if (kIndexing.count(name)) each_tensor(given[1], [&](const Tensor& index) {
    found |= index.scalar_type() == at::kBool || index.scalar_type() == at::kByte || !index.is_cuda();
  });
  return found;
}

void call(const c10::OperatorHandle& operation, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  operation.callBoxed(stack);
}

void compute(const c10::OperatorHandle& operation, c10::DispatchKeySet, Stack* stack) {
  const auto& schema = operation.schema();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const std::vector<IValue> given(stack->end() - schema.arguments().size(), stack->end());
  const bool is_copy = name == "aten::copy_";
  bool draws = operation.hasTag(at::Tag::nondeterministic_seeded);
  for (const IValue& value : given) {
    each_tensor(value, [&](const Tensor& tensor) {
      TORCH_CHECK(tensor.is_cuda() || tensor.dim() == 0 || is_copy || kIndexing.count(name),
                  "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", name, ")");
    });
    draws &= !value.isGenerator();
  }
  if (kVarying.count(schema.name())) at::globalContext().alertNotDeterministic(name);
  const bool must_wait = waits(name, given);
  if (must_wait) wait_for_device(name);

  Lent lent;
  Stack arguments;
  for (const IValue& value : given)
    arguments.push_back(converted(value, [&](const Tensor& tensor) {
      return tensor.defined() && tensor.is_cuda() ? lent.to_host(tensor) : tensor;
    }));
  torch::jit::drop(*stack, given.size());
  if (is_copy && current_stream != 0 && !must_wait && !is_recorded()) {
    put_off(current_stream, [operation, arguments] {
      Stack later = arguments;
      call(operation, &later);
    });
    stack->push_back(given[0]);
    return;
  }
  const auto numbers = numbers_of(default_generator());
  const auto run = [operation, draws, numbers](Stack* values) {
    draws ? drawing_from(numbers, [&] { call(operation, values); }) : call(operation, values);
  };
  Stack results = arguments;
  run(&results);
  if (is_recorded()) {
    std::vector<Tensor> kept;
    for (const IValue& value : results)
      each_tensor(value, [&](const Tensor& result) { kept.push_back(lent.is_new(result) ? result : Tensor()); });
    recording->steps.push_back([arguments, run, kept] {
      Stack again = arguments;
      run(&again);
      size_t place = 0;
      for (const IValue& value : again)
        each_tensor(value, [&](const Tensor& result) {
          const Tensor& target = kept.at(place++);
          at::AutoDispatchBelowADInplaceOrView below;
          if (target.defined()) target.copy_(result);
        });
    });
  }
  lent.take_sizes();
  for (const IValue& value : results)
    stack->push_back(converted(value, [&](const Tensor& tensor) { return lent.to_device(tensor); }));
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, c10::dtype_or_default(dtype));
}

void record_stream(Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("record_stream", &record_stream);
  for (const char* name : {"copy_", "convolution", "convolution_backward"})  // those ask which device computes
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&compute>());
}
