// Lets a PyTorch without CUDA compute shapes on "cuda" tensors that have no memory, backward passes included: it takes
// this machine to have one device, whose streams and events do nothing. To be loaded before PyTorch is imported.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {

struct OneDevice : CUDAHooksInterface {
  OneDevice(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneDevice)

} // namespace at

namespace {

using namespace c10;

const Device kDevice(DeviceType::CUDA, 0);

struct NoGuard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new NoGuard());

} // namespace
