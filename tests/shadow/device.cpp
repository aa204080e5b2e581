// A device of type `cuda` in host memory, for CPU builds of PyTorch. Every operator runs its CPU
// kernel on the same memory, so values are real. Tensors say cuda:0, a CPU tensor among them is an
// error as on a GPU, and an allocator counts the bytes that are held.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <set>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IntArrayRef;
using c10::IValue;
using c10::Stream;

namespace {

const Device CUDA(DeviceType::CUDA, 0);

// There is one stream, on which everything is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream only() { return Stream(Stream::DEFAULT, CUDA); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CUDA; }
  Device getDevice() const override { return CUDA; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}

namespace {

// -- Memory ---------------------------------------------------------------------------------------

std::atomic<int64_t> held{0}, most_held{0};

void count_up(int64_t bytes) {
  auto now = held += bytes;
  auto most = most_held.load();
  while (now > most && !most_held.compare_exchange_weak(most, now)) {
  }
}

struct Block {
  void* data;
  int64_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  held -= block->bytes;
  std::free(block->data);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) TORCH_CHECK(!posix_memalign(&data, 512, bytes), "shadow device: out of memory");
    count_up(bytes);
    return {data, new Block{data, static_cast<int64_t>(bytes)}, &free_block, CUDA};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Allocator allocator;

// Keeps a storage alive that another one, of the other device, shares its memory with.
struct Shared {
  c10::Storage storage;
  int64_t counted;
};

void drop_shared(void* context) {
  auto* shared = static_cast<Shared*>(context);
  held -= shared->counted;
  delete shared;
}

Tensor over(c10::DataPtr data, size_t bytes, DispatchKey key, const Tensor& like) {
  c10::Allocator* source = &allocator;
  if (key == DispatchKey::CPU) source = c10::GetCPUAllocator();
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, std::move(data), source, true);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

Tensor to_host(const Tensor& tensor) {  // the same memory as a CPU tensor
  auto& storage = tensor.storage();
  c10::DataPtr data{storage.mutable_data(), new Shared{storage, 0}, &drop_shared,
                    Device(DeviceType::CPU)};
  auto host = over(std::move(data), storage.nbytes(), DispatchKey::CPU, tensor);
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number())
    host.unsafeGetTensorImpl()->set_wrapped_number(true);
  return host;
}

Tensor to_device(const Tensor& tensor) {  // what a CPU kernel made, as a device tensor
  auto& storage = tensor.storage();
  int64_t bytes = storage.nbytes();
  count_up(bytes);
  c10::DataPtr data{storage.mutable_data(), new Shared{storage, bytes}, &drop_shared, CUDA};
  return over(std::move(data), bytes, DispatchKey::CUDA, tensor);
}

// -- Operators that make, view and move tensors ---------------------------------------------------

Tensor empty_memory_format(IntArrayRef size, std::optional<at::ScalarType> dtype,
                           std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
                           std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, DispatchKeySet(DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
                                           DispatchKeySet(DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride,
                  std::optional<int64_t> offset) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride,
                                                    offset.value_or(self.storage_offset()));
  return made;
}

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return as_strided(self, size, stride, self.storage_offset());
}

Tensor view(const Tensor& self, IntArrayRef size) {
  auto host = to_host(self).view(size);
  return as_strided(self, host.sizes(), host.strides(), self.storage_offset());
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat>) {
  int64_t elements = 1;
  for (auto one : size) elements *= one;
  int64_t bytes = (self.storage_offset() + elements) * self.dtype().itemsize();
  auto* impl = self.unsafeGetTensorImpl();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (static_cast<int64_t>(storage->nbytes()) < bytes) {
    auto fresh = allocator.allocate(bytes);
    if (storage->nbytes()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(bytes);
  }
  impl->generic_set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage_offset(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size,
                           IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.data() && stride.size() == size.size() && size.size()) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->generic_set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  int64_t elements = storage.nbytes() / self.dtype().itemsize();
  return set_storage_offset(self, std::move(storage), 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return set_storage_offset(self, other.storage(), other.storage_offset(), other.sizes(),
                            other.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_tensor(self, empty_memory_format({0}, self.scalar_type(), {}, {}, {}, {}));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  auto to = self.is_cuda() ? to_host(self) : self;
  to.copy_(source.is_cuda() ? to_host(source) : source);
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& to, bool non_blocking) {
  Tensor into = to;
  return copy_(into, source, non_blocking);
}

// Which attention: the one that is written in terms of other operators.
int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;
}

// -- All other operators --------------------------------------------------------------------------

// A GPU takes indices from the CPU as well (and copies them).
bool takes_host_indices(const std::string& name) {
  static const std::set<std::string> names{"aten::index.Tensor",        "aten::index_put_",
                                           "aten::_index_put_impl_",    "aten::index_put",
                                           "aten::_unsafe_index.Tensor", "aten::index.Tensor_out"};
  return names.count(name);
}

// The tensors of one call, on the device and as the CPU kernel sees them.
class Call {
 public:
  IValue argument(const IValue& value) {
    if (value.isTensor()) return host(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (Tensor tensor : value.toTensorList()) list.push_back(host(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (std::optional<Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<Tensor>(host(*tensor)) : tensor);
      return list;
    }
    if (value.isDevice() && value.toDevice().is_cuda()) return Device(DeviceType::CPU);
    return value;
  }

  IValue result(const IValue& value) {
    if (value.isTensor()) return device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (Tensor tensor : value.toTensorList()) list.push_back(device(tensor));
      return list;
    }
    return value;
  }

  void check_devices(const std::string& name) const {
    TORCH_CHECK(stranger_.empty() || originals_.empty() || takes_host_indices(name), name,
                ": Expected all tensors to be on the same device, but found at least two, cuda:0 "
                "and cpu ", stranger_);
  }

  // An argument that the kernel has resized, or moved to other memory.
  void take_over_moved() {
    for (size_t i = 0; i < originals_.size(); ++i) {
      const auto &original = originals_[i], &host = hosts_[i];
      if (host.storage().data() != original.storage().data() || host.sizes() != original.sizes()) {
        Tensor moved = originals_[i];
        set_tensor(moved, to_device(host));
      }
    }
  }

 private:
  Tensor host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.device().is_cpu() && tensor.dim() > 0 && tensor.numel() > 0)
        stranger_ = c10::str(tensor.sizes());
      return tensor;
    }
    for (size_t i = 0; i < originals_.size(); ++i)
      if (originals_[i].is_same(tensor)) return hosts_[i];
    originals_.push_back(tensor);
    hosts_.push_back(to_host(tensor));
    return hosts_.back();
  }

  Tensor device(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (size_t i = 0; i < hosts_.size(); ++i)
      if (hosts_[i].is_same(tensor)) return originals_[i];
    for (size_t i = 0; i < hosts_.size(); ++i)  // a view of an argument
      if (tensor.numel() && tensor.dtype() == hosts_[i].dtype() &&
          tensor.storage().data() == hosts_[i].storage().data())
        return as_strided(originals_[i], tensor.sizes(), tensor.strides(),
                          tensor.storage_offset());
    return tensor.device().is_cpu() ? to_device(tensor) : tensor;
  }

  std::vector<Tensor> originals_, hosts_;
  std::string stranger_;
};

void on_cpu_kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto name = op.operator_name().name;
  if (!op.operator_name().overload_name.empty()) name += "." + op.operator_name().overload_name;
  // Also keeps the arguments alive until the results are there.
  const std::vector<IValue> given(stack->end() - schema.arguments().size(), stack->end());
  Call call;
  for (size_t i = 0; i < given.size(); ++i)
    (*stack)[stack->size() - given.size() + i] = call.argument(given[i]);
  call.check_devices(name);
  op.callBoxed(stack);
  call.take_over_moved();
  for (auto value = stack->end() - schema.returns().size(); value != stack->end(); ++value)
    *value = call.result(*value);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu_kernel>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty_memory_format);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &as_strided);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("view", &view);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_nothing);
  library.impl("copy_", &copy_);
  library.impl("_copy_from", &copy_from);
  library.impl("_fused_sdp_choice", &attention_choice);
}

TORCH_LIBRARY(shadow, library) { library.def("host(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(shadow, CUDA, library) { library.impl("host", &to_host); }

extern "C" {
int64_t shadow_held() { return held.load(); }
int64_t shadow_most_held() { return most_held.load(); }
void shadow_reset_most_held() { most_held = held.load(); }
}
