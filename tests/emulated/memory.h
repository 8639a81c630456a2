// Included by device.cpp: the memory of the device, and main memory that is pinned.

// It is counted, limited, and filled with bytes that are no useful numbers. What is allocated while something is
// recorded is of a pool, which keeps the most that it had at a time as long as a recording uses it.

struct Pool {
  int64_t now = 0, most = 0, users = 0;
};

std::map<int64_t, Pool> pools;
std::set<int64_t> taken_from;  // the pools into which something is recorded
int64_t used = 0, peak = 0, total = int64_t(4) << 30, allowed = total;
pid_t owner = 0;  // the process that first asks CUDA for devices; those that are forked from it cannot use any
bool is_begun = false;

int64_t pool_of_recording();  // 0 if this is not recorded

void ask() {
  if (owner == 0) owner = getpid();
}

void begin_to_use() {
  ask();
  TORCH_CHECK(owner == getpid(), "CUDA error: initialization error (this process was forked from one that asked CUDA)");
  is_begun = true;
}

int64_t take(int64_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  begin_to_use();
  const int64_t number = pool_of_recording();
  const int64_t more = number == 0 ? bytes : std::max<int64_t>(0, pools[number].now + bytes - pools[number].most);
  TORCH_CHECK_WITH(OutOfMemoryError, used + more <= allowed, "CUDA out of memory. (emulated)");
  if (number != 0) {
    pools[number].now += bytes;
    pools[number].most += more;
  }
  used += more;
  peak = std::max(peak, used);
  return number;
}

void shrink(int64_t number) {
  Pool& pool = pools[number];
  if (pool.users > 0) return;
  used -= pool.most - pool.now;
  pool.most = pool.now;
  if (pool.now == 0) pools.erase(number);
}

void give_back(int64_t bytes, int64_t number) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  if (number == 0) {
    used -= bytes;
    return;
  }
  pools[number].now -= bytes;
  shrink(number);
}

void end_pool(int64_t number) {
  TORCH_CHECK(taken_from.erase(number), "endAllocatePool: not currently recording to mempool_id");
}

void release_pool(int64_t number) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  pools[number].users--;
  shrink(number);
}

struct Block {
  void* memory;
  int64_t bytes, pool;
};

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, [](void*) {}, kGpu};
    const int64_t pool = take(bytes);
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    std::memset(memory, 0x7b, bytes);
    auto free = [](void* context) {
      auto* block = static_cast<Block*>(context);
      give_back(block->bytes, block->pool);
      std::free(block->memory);
      delete block;
    };
    return {memory, new Block{memory, int64_t(bytes), pool}, free, kGpu};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} device_memory;

std::map<const char*, size_t> pinned;

bool is_pinned(const void* place) {
  std::lock_guard<std::recursive_mutex> lock(device_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(place));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(place) < after->first + after->second;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::aligned_alloc(512, (bytes + 512) / 512 * 512);
    std::lock_guard<std::recursive_mutex> lock(device_mutex);
    pinned[static_cast<const char*>(memory)] = std::max<size_t>(bytes, 1);
    auto free = [](void* memory) {
      std::lock_guard<std::recursive_mutex> lock(device_mutex);
      pinned.erase(static_cast<const char*>(memory));
      std::free(memory);
    };
    return {memory, memory, free, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
} pinned_memory;
