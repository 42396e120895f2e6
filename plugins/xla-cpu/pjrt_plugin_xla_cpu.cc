// A PJRT plugin for the CPU: XLA's own CPU client, as the public TensorFlow wheel exports it in C++, behind the C API.
//
// No public package ships such a plugin, and the wheel does not export the C wrapper that XLA has. So this fills the table for the
// calls that a runtime needs to list devices, move tensors, compile StableHLO and run it; the rest answer UNIMPLEMENTED. What the
// header says of each call holds here; where this does less, the function says so.
//
// Option of the client: cpu_device_count (int64, 2 unless given), the number of devices that share the machine's cores.
//
// fused_xent_live_objects() counts the objects that callers hold, for tests of callers.

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "xla/future.h"
#include "xla/hlo/builder/xla_computation.h"
#include "xla/literal.h"
#include "xla/pjrt/c/pjrt_c_api.h"
#include "xla/pjrt/pjrt_client.h"
#include "xla/pjrt/pjrt_executable.h"
#include "xla/pjrt/plugin/xla_cpu/cpu_client_options.h"
#include "xla/pjrt/plugin/xla_cpu/xla_cpu_pjrt_client.h"
#include "xla/pjrt/proto/compile_options.pb.h"
#include "xla/shape_util.h"

namespace xla {
// As xla/pjrt/mlir_to_hlo.h declares it, which needs LLVM's headers.
absl::Status ParseMlirModuleStringAndConvertToXlaComputation(absl::string_view mlir_module_str,
                                                             XlaComputation& xla_computation, bool use_tuple_args,
                                                             bool return_tuple);
}  // namespace xla

namespace {

std::atomic<int64_t> live_objects{0};

// What callers hold and must free.
struct Counted {
  Counted() { ++live_objects; }
  Counted(const Counted&) = delete;
  ~Counted() { --live_objects; }
};

}  // namespace

struct PJRT_Error : Counted {
  explicit PJRT_Error(absl::Status status) : status(std::move(status)), message(this->status.message()) {}
  absl::Status status;
  std::string message;
};

struct PJRT_Event : Counted {
  explicit PJRT_Event(xla::Future<> future) : future(std::move(future)) {}
  xla::Future<> future;
};

struct PJRT_DeviceDescription {
  int id;
  int process_index;
  std::string kind;
  std::string debug_string;
};

struct PJRT_Device {
  xla::PjRtDevice* device;
  PJRT_DeviceDescription description;
};

// The table outlives every client; the client must outlive what came of it.
struct PJRT_Client : Counted {
  std::unique_ptr<xla::PjRtClient> client;
  std::vector<std::unique_ptr<PJRT_Device>> devices;
  std::vector<PJRT_Device*> device_pointers;
  std::string platform_name;
  std::string platform_version;
};

struct PJRT_Buffer : Counted {
  PJRT_Buffer(std::unique_ptr<xla::PjRtBuffer> buffer, PJRT_Client* client) : buffer(std::move(buffer)), client(client) {}
  std::unique_ptr<xla::PjRtBuffer> buffer;
  PJRT_Client* client;
};

struct PJRT_LoadedExecutable : Counted {
  std::shared_ptr<xla::PjRtLoadedExecutable> executable;
  PJRT_Client* client;
};

struct PJRT_Executable : Counted {
  std::shared_ptr<xla::PjRtLoadedExecutable> executable;
  std::string name;
  std::vector<PJRT_Buffer_Type> output_types;
  std::vector<int64_t> output_dims;
  std::vector<size_t> output_ranks;
  // Made when first asked for.
  std::vector<std::string> cost_names;
  std::vector<PJRT_NamedValue> costs;
};

struct PJRT_SerializedExecutable : Counted {
  std::string bytes;
};

namespace {

PJRT_Error* Refuse(absl::Status status) { return status.ok() ? nullptr : new PJRT_Error(std::move(status)); }

#define REFUSE_IF_ERROR(expression)                                     \
  if (absl::Status status_ = (expression); !status_.ok()) {             \
    return new PJRT_Error(std::move(status_));                          \
  }

#define ASSIGN_OR_REFUSE(left, expression)                              \
  auto left##_or = (expression);                                        \
  if (!left##_or.ok()) return new PJRT_Error(left##_or.status());       \
  auto left = *std::move(left##_or);

// Refuses a struct of a caller that is older than this file.
PJRT_Error* CheckSize(const char* name, size_t found, size_t expected) {
  if (found >= expected) return nullptr;
  return new PJRT_Error(absl::InvalidArgumentError(
      absl::StrCat(name, ": struct_size is ", found, ", expected ", expected, " or more: the caller's header is too old")));
}

#define CHECK_SIZE(name)                                                                              \
  if (PJRT_Error* error_ = CheckSize(#name, args->struct_size, name##_STRUCT_SIZE)) return error_

struct TypePair {
  PJRT_Buffer_Type api;
  xla::PrimitiveType xla;
};

constexpr TypePair kTypes[] = {
    {PJRT_Buffer_Type_PRED, xla::PRED}, {PJRT_Buffer_Type_S8, xla::S8},   {PJRT_Buffer_Type_S16, xla::S16},
    {PJRT_Buffer_Type_S32, xla::S32},   {PJRT_Buffer_Type_S64, xla::S64}, {PJRT_Buffer_Type_U8, xla::U8},
    {PJRT_Buffer_Type_U16, xla::U16},   {PJRT_Buffer_Type_U32, xla::U32}, {PJRT_Buffer_Type_U64, xla::U64},
    {PJRT_Buffer_Type_F16, xla::F16},   {PJRT_Buffer_Type_F32, xla::F32}, {PJRT_Buffer_Type_F64, xla::F64},
    {PJRT_Buffer_Type_BF16, xla::BF16}, {PJRT_Buffer_Type_C64, xla::C64}, {PJRT_Buffer_Type_C128, xla::C128},
};

absl::StatusOr<xla::PrimitiveType> ToXla(PJRT_Buffer_Type type) {
  for (const TypePair& pair : kTypes) {
    if (pair.api == type) return pair.xla;
  }
  return absl::UnimplementedError(absl::StrCat("element type ", type));
}

PJRT_Buffer_Type FromXla(xla::PrimitiveType type) {
  for (const TypePair& pair : kTypes) {
    if (pair.xla == type) return pair.api;
  }
  return PJRT_Buffer_Type_INVALID;
}

// ---- errors and events

void ErrorDestroy(PJRT_Error_Destroy_Args* args) { delete args->error; }

void ErrorMessage(PJRT_Error_Message_Args* args) {
  args->message = args->error->message.data();
  args->message_size = args->error->message.size();
}

PJRT_Error* ErrorGetCode(PJRT_Error_GetCode_Args* args) {
  args->code = static_cast<PJRT_Error_Code>(args->error->status.code());
  return nullptr;
}

PJRT_Error* EventDestroy(PJRT_Event_Destroy_Args* args) {
  delete args->event;
  return nullptr;
}

PJRT_Error* EventIsReady(PJRT_Event_IsReady_Args* args) {
  args->is_ready = args->event->future.IsReady();
  return nullptr;
}

PJRT_Error* EventAwait(PJRT_Event_Await_Args* args) { return Refuse(args->event->future.Await()); }

PJRT_Error* EventError(PJRT_Event_Error_Args* args) {
  if (!args->event->future.IsReady()) {
    return new PJRT_Error(absl::FailedPreconditionError("the event has not happened yet"));
  }
  return Refuse(args->event->future.Await());
}

PJRT_Error* EventOnReady(PJRT_Event_OnReady_Args* args) {
  args->event->future.OnReady([callback = args->callback, user_arg = args->user_arg](const absl::Status& status) {
    callback(Refuse(status), user_arg);
  });
  return nullptr;
}

// ---- plugin and client

PJRT_Error* PluginInitialize(PJRT_Plugin_Initialize_Args* args) {
  CHECK_SIZE(PJRT_Plugin_Initialize_Args);
  return nullptr;
}

PJRT_Error* PluginAttributes(PJRT_Plugin_Attributes_Args* args) {
  CHECK_SIZE(PJRT_Plugin_Attributes_Args);
  args->attributes = nullptr;
  args->num_attributes = 0;
  return nullptr;
}

PJRT_Error* ClientCreate(PJRT_Client_Create_Args* args) {
  CHECK_SIZE(PJRT_Client_Create_Args);
  int64_t device_count = 2;
  for (size_t i = 0; i < args->num_options; ++i) {
    const PJRT_NamedValue& option = args->create_options[i];
    const std::string name(option.name, option.name_size);
    if (name != "cpu_device_count" || option.type != PJRT_NamedValue_kInt64) {
      return new PJRT_Error(absl::InvalidArgumentError(
          absl::StrCat("option ", name, ": unknown, or of another type; expected cpu_device_count, an int64")));
    }
    device_count = option.int64_value;
  }
  if (device_count < 1 || device_count > 4096) {
    return new PJRT_Error(absl::InvalidArgumentError(absl::StrCat("cpu_device_count = ", device_count, ": expected 1 to 4096")));
  }
  xla::CpuClientOptions options;
  options.cpu_device_count = static_cast<int>(device_count);
  ASSIGN_OR_REFUSE(client, xla::GetXlaPjrtCpuClient(std::move(options)));
  auto made = std::make_unique<PJRT_Client>();
  for (xla::PjRtDevice* device : client->addressable_devices()) {
    auto wrapped = std::make_unique<PJRT_Device>();
    wrapped->device = device;
    wrapped->description = {device->id(), device->process_index(), std::string(device->device_kind()),
                            std::string(device->DebugString())};
    made->device_pointers.push_back(wrapped.get());
    made->devices.push_back(std::move(wrapped));
  }
  made->platform_name = std::string(client->platform_name());
  made->platform_version = absl::StrCat("XLA:CPU of tensorflow-cpu 2.21.0; ", client->platform_version());
  made->client = std::move(client);
  args->client = made.release();
  return nullptr;
}

PJRT_Error* ClientDestroy(PJRT_Client_Destroy_Args* args) {
  delete args->client;
  return nullptr;
}

PJRT_Error* ClientPlatformName(PJRT_Client_PlatformName_Args* args) {
  args->platform_name = args->client->platform_name.data();
  args->platform_name_size = args->client->platform_name.size();
  return nullptr;
}

PJRT_Error* ClientPlatformVersion(PJRT_Client_PlatformVersion_Args* args) {
  args->platform_version = args->client->platform_version.data();
  args->platform_version_size = args->client->platform_version.size();
  return nullptr;
}

PJRT_Error* ClientProcessIndex(PJRT_Client_ProcessIndex_Args* args) {
  args->process_index = args->client->client->process_index();
  return nullptr;
}

PJRT_Error* ClientDevices(PJRT_Client_Devices_Args* args) {
  args->devices = args->client->device_pointers.data();
  args->num_devices = args->client->device_pointers.size();
  return nullptr;
}

PJRT_Error* ClientAddressableDevices(PJRT_Client_AddressableDevices_Args* args) {
  args->addressable_devices = args->client->device_pointers.data();
  args->num_addressable_devices = args->client->device_pointers.size();
  return nullptr;
}

PJRT_Error* ClientLookupDevice(PJRT_Client_LookupDevice_Args* args) {
  for (PJRT_Device* device : args->client->device_pointers) {
    if (device->description.id == args->id) {
      args->device = device;
      return nullptr;
    }
  }
  return new PJRT_Error(absl::NotFoundError(absl::StrCat("no device has the id ", args->id)));
}

PJRT_Error* DeviceGetDescription(PJRT_Device_GetDescription_Args* args) {
  args->device_description = &args->device->description;
  return nullptr;
}

PJRT_Error* DeviceIsAddressable(PJRT_Device_IsAddressable_Args* args) {
  args->is_addressable = true;
  return nullptr;
}

PJRT_Error* DeviceLocalHardwareId(PJRT_Device_LocalHardwareId_Args* args) {
  args->local_hardware_id = args->device->device->local_hardware_id().value();
  return nullptr;
}

PJRT_Error* DescriptionId(PJRT_DeviceDescription_Id_Args* args) {
  args->id = args->device_description->id;
  return nullptr;
}

PJRT_Error* DescriptionProcessIndex(PJRT_DeviceDescription_ProcessIndex_Args* args) {
  args->process_index = args->device_description->process_index;
  return nullptr;
}

PJRT_Error* DescriptionKind(PJRT_DeviceDescription_Kind_Args* args) {
  args->device_kind = args->device_description->kind.data();
  args->device_kind_size = args->device_description->kind.size();
  return nullptr;
}

PJRT_Error* DescriptionDebugString(PJRT_DeviceDescription_DebugString_Args* args) {
  args->debug_string = args->device_description->debug_string.data();
  args->debug_string_size = args->device_description->debug_string.size();
  return nullptr;
}

// ---- buffers

// Takes tensors without strides, on a device and not in another memory of it.
PJRT_Error* BufferFromHostBuffer(PJRT_Client_BufferFromHostBuffer_Args* args) {
  CHECK_SIZE(PJRT_Client_BufferFromHostBuffer_Args);
  if (args->device == nullptr || args->memory != nullptr || args->device_layout != nullptr || args->num_byte_strides != 0) {
    return new PJRT_Error(absl::UnimplementedError("memories, layouts and strides; give a device and dense data"));
  }
  ASSIGN_OR_REFUSE(type, ToXla(args->type));
  ASSIGN_OR_REFUSE(memory, args->device->device->default_memory_space());
  const absl::Span<const int64_t> dims(args->dims, args->num_dims);
  auto promise_and_future = xla::MakePromise<>();
  xla::Future<> done = std::move(promise_and_future.second);
  auto promise = std::move(promise_and_future.first).ToShared();
  ASSIGN_OR_REFUSE(buffer, args->client->client->BufferFromHostBuffer(
                               args->data, type, dims, std::nullopt,
                               static_cast<xla::PjRtClient::HostBufferSemantics>(args->host_buffer_semantics),
                               [promise]() { promise->Set(absl::OkStatus()); }, memory, nullptr));
  args->buffer = new PJRT_Buffer(std::move(buffer), args->client);
  args->done_with_host_buffer = new PJRT_Event(std::move(done));
  return nullptr;
}

PJRT_Error* BufferDestroy(PJRT_Buffer_Destroy_Args* args) {
  delete args->buffer;
  return nullptr;
}

PJRT_Error* BufferElementType(PJRT_Buffer_ElementType_Args* args) {
  args->type = FromXla(args->buffer->buffer->element_type());
  return nullptr;
}

PJRT_Error* BufferDimensions(PJRT_Buffer_Dimensions_Args* args) {
  const absl::Span<const int64_t> dims = args->buffer->buffer->dimensions();
  args->dims = dims.data();
  args->num_dims = dims.size();
  return nullptr;
}

PJRT_Error* BufferOnDeviceSize(PJRT_Buffer_OnDeviceSizeInBytes_Args* args) {
  ASSIGN_OR_REFUSE(size, args->buffer->buffer->GetOnDeviceSizeInBytes());
  args->on_device_size_in_bytes = size;
  return nullptr;
}

PJRT_Error* BufferDelete(PJRT_Buffer_Delete_Args* args) {
  args->buffer->buffer->Delete();
  return nullptr;
}

PJRT_Error* BufferIsDeleted(PJRT_Buffer_IsDeleted_Args* args) {
  args->is_deleted = args->buffer->buffer->IsDeleted();
  return nullptr;
}

PJRT_Error* BufferIsOnCpu(PJRT_Buffer_IsOnCpu_Args* args) {
  args->is_on_cpu = true;
  return nullptr;
}

PJRT_Error* BufferReadyEvent(PJRT_Buffer_ReadyEvent_Args* args) {
  args->event = new PJRT_Event(args->buffer->buffer->GetReadyFuture());
  return nullptr;
}

PJRT_Error* BufferDevice(PJRT_Buffer_Device_Args* args) {
  for (PJRT_Device* device : args->buffer->client->device_pointers) {
    if (device->device == args->buffer->buffer->device()) args->device = device;
  }
  return nullptr;
}

// Takes a layout that is an order of dimensions.
PJRT_Error* BufferToHostBuffer(PJRT_Buffer_ToHostBuffer_Args* args) {
  CHECK_SIZE(PJRT_Buffer_ToHostBuffer_Args);
  xla::PjRtBuffer& buffer = *args->src->buffer;
  std::vector<int64_t> minor_to_major;
  if (args->host_layout == nullptr) {
    for (int64_t i = buffer.dimensions().size(); i-- > 0;) minor_to_major.push_back(i);
  } else if (args->host_layout->type == PJRT_Buffer_MemoryLayout_Type_Tiled && args->host_layout->tiled.num_tiles == 0) {
    const PJRT_Buffer_MemoryLayout_Tiled& tiled = args->host_layout->tiled;
    minor_to_major.assign(tiled.minor_to_major, tiled.minor_to_major + tiled.minor_to_major_size);
  } else {
    return new PJRT_Error(absl::UnimplementedError("strides and tiles; give an order of dimensions"));
  }
  if (minor_to_major.size() != buffer.dimensions().size()) {
    return new PJRT_Error(absl::InvalidArgumentError("the layout is of another rank"));
  }
  const xla::Shape shape =
      xla::ShapeUtil::MakeShapeWithDenseLayout(buffer.element_type(), buffer.dimensions(), minor_to_major);
  const size_t size = xla::ShapeUtil::ByteSizeOfElements(shape);
  if (args->dst == nullptr) {
    args->dst_size = size;
    return nullptr;
  }
  if (args->dst_size < size) {
    return new PJRT_Error(absl::InvalidArgumentError(absl::StrCat("dst_size is ", args->dst_size, ", expected ", size)));
  }
  auto literal = std::make_shared<xla::MutableBorrowingLiteral>(static_cast<const char*>(args->dst), shape);
  xla::Future<> copied = buffer.ToLiteral(literal.get());
  copied.OnReady([literal](const absl::Status&) {});
  args->event = new PJRT_Event(std::move(copied));
  return nullptr;
}

PJRT_Error* BufferCopyToDevice(PJRT_Buffer_CopyToDevice_Args* args) {
  ASSIGN_OR_REFUSE(memory, args->dst_device->device->default_memory_space());
  ASSIGN_OR_REFUSE(buffer, args->buffer->buffer->CopyToMemorySpace(memory));
  args->dst_buffer = new PJRT_Buffer(std::move(buffer), args->buffer->client);
  return nullptr;
}

// ---- programs

PJRT_Error* ClientCompile(PJRT_Client_Compile_Args* args) {
  CHECK_SIZE(PJRT_Client_Compile_Args);
  const std::string format(args->program->format, args->program->format_size);
  if (format != "mlir") {
    return new PJRT_Error(absl::UnimplementedError(absl::StrCat("format ", format, "; expected mlir")));
  }
  xla::CompileOptionsProto proto;
  if (!proto.ParseFromString(std::string(args->compile_options, args->compile_options_size))) {
    return new PJRT_Error(absl::InvalidArgumentError("compile_options: no CompileOptionsProto"));
  }
  ASSIGN_OR_REFUSE(options, xla::CompileOptions::FromProto(proto));
  xla::XlaComputation computation;
  REFUSE_IF_ERROR(xla::ParseMlirModuleStringAndConvertToXlaComputation(
      absl::string_view(args->program->code, args->program->code_size), computation, /*use_tuple_args=*/false,
      /*return_tuple=*/false));
  ASSIGN_OR_REFUSE(executable, args->client->client->CompileAndLoad(computation, std::move(options)));
  auto made = std::make_unique<PJRT_LoadedExecutable>();
  made->executable = std::move(executable);
  made->client = args->client;
  args->executable = made.release();
  return nullptr;
}

PJRT_Error* LoadedDestroy(PJRT_LoadedExecutable_Destroy_Args* args) {
  delete args->executable;
  return nullptr;
}

PJRT_Error* LoadedGetExecutable(PJRT_LoadedExecutable_GetExecutable_Args* args) {
  auto made = std::make_unique<PJRT_Executable>();
  made->executable = args->loaded_executable->executable;
  xla::PjRtExecutable& executable = *made->executable->GetExecutable();
  made->name = std::string(executable.name());
  ASSIGN_OR_REFUSE(types, executable.GetOutputElementTypes());
  ASSIGN_OR_REFUSE(dims, executable.GetOutputDimensions());
  if (types.size() != 1 || dims.size() != 1) return new PJRT_Error(absl::UnimplementedError("several partitions"));
  for (xla::PrimitiveType type : types[0]) made->output_types.push_back(FromXla(type));
  for (const xla::DimensionVector& of_output : dims[0]) {
    made->output_dims.insert(made->output_dims.end(), of_output.begin(), of_output.end());
    made->output_ranks.push_back(of_output.size());
  }
  args->executable = made.release();
  return nullptr;
}


// Runs a program of one device, on the one that it was compiled for.
PJRT_Error* LoadedExecute(PJRT_LoadedExecutable_Execute_Args* args) {
  CHECK_SIZE(PJRT_LoadedExecutable_Execute_Args);
  if (args->num_devices != 1 || args->execute_device != nullptr) {
    return new PJRT_Error(absl::UnimplementedError("programs of several devices, and devices chosen at execution"));
  }
  std::vector<xla::PjRtBuffer*> arguments;
  for (size_t i = 0; i < args->num_args; ++i) arguments.push_back(args->argument_lists[0][i]->buffer.get());
  xla::ExecuteOptions options;
  for (size_t i = 0; i < args->options->num_non_donatable_input_indices; ++i) {
    options.non_donatable_input_indices.insert(args->options->non_donatable_input_indices[i]);
  }
  std::optional<std::vector<xla::Future<>>> futures;
  if (args->device_complete_events != nullptr) futures.emplace();
  ASSIGN_OR_REFUSE(outputs, args->executable->executable->Execute({arguments}, options, futures));
  for (size_t i = 0; i < outputs[0].size(); ++i) {
    args->output_lists[0][i] = new PJRT_Buffer(std::move(outputs[0][i]), args->executable->client);
  }
  if (futures.has_value()) args->device_complete_events[0] = new PJRT_Event(std::move((*futures)[0]));
  return nullptr;
}

PJRT_Error* ExecutableDestroy(PJRT_Executable_Destroy_Args* args) {
  delete args->executable;
  return nullptr;
}

PJRT_Error* ExecutableName(PJRT_Executable_Name_Args* args) {
  args->executable_name = args->executable->name.data();
  args->executable_name_size = args->executable->name.size();
  return nullptr;
}

PJRT_Error* ExecutableNumReplicas(PJRT_Executable_NumReplicas_Args* args) {
  args->num_replicas = args->executable->executable->num_replicas();
  return nullptr;
}

PJRT_Error* ExecutableNumPartitions(PJRT_Executable_NumPartitions_Args* args) {
  args->num_partitions = args->executable->executable->num_partitions();
  return nullptr;
}

PJRT_Error* ExecutableNumOutputs(PJRT_Executable_NumOutputs_Args* args) {
  args->num_outputs = args->executable->output_types.size();
  return nullptr;
}

PJRT_Error* ExecutableOutputElementTypes(PJRT_Executable_OutputElementTypes_Args* args) {
  args->output_types = args->executable->output_types.data();
  args->num_output_types = args->executable->output_types.size();
  return nullptr;
}

PJRT_Error* ExecutableOutputDimensions(PJRT_Executable_OutputDimensions_Args* args) {
  args->num_outputs = args->executable->output_ranks.size();
  args->dims = args->executable->output_dims.data();
  args->dim_sizes = args->executable->output_ranks.data();
  return nullptr;
}

PJRT_Error* ExecutableCodeSize(PJRT_Executable_SizeOfGeneratedCodeInBytes_Args* args) {
  args->size_in_bytes = args->executable->executable->SizeOfGeneratedCodeInBytes();
  return nullptr;
}

PJRT_Error* ExecutableMemory(PJRT_Executable_GetCompiledMemoryStats_Args* args) {
  CHECK_SIZE(PJRT_Executable_GetCompiledMemoryStats_Args);
  ASSIGN_OR_REFUSE(stats, args->executable->executable->GetExecutable()->GetCompiledMemoryStats());
  args->generated_code_size_in_bytes = stats.generated_code_size_in_bytes;
  args->argument_size_in_bytes = stats.argument_size_in_bytes;
  args->output_size_in_bytes = stats.output_size_in_bytes;
  args->alias_size_in_bytes = stats.alias_size_in_bytes;
  args->temp_size_in_bytes = stats.temp_size_in_bytes;
  args->host_generated_code_size_in_bytes = stats.host_generated_code_size_in_bytes;
  args->host_argument_size_in_bytes = stats.host_argument_size_in_bytes;
  args->host_output_size_in_bytes = stats.host_output_size_in_bytes;
  args->host_alias_size_in_bytes = stats.host_alias_size_in_bytes;
  args->host_temp_size_in_bytes = stats.host_temp_size_in_bytes;
  args->peak_memory_in_bytes = stats.peak_memory_in_bytes;
  args->total_size_in_bytes = stats.total_size_in_bytes;
  return nullptr;
}

// Gives the figures that are numbers; asked of one executable by one thread at a time.
PJRT_Error* ExecutableCost(PJRT_Executable_GetCostAnalysis_Args* args) {
  CHECK_SIZE(PJRT_Executable_GetCostAnalysis_Args);
  PJRT_Executable& executable = *args->executable;
  if (executable.costs.empty()) {
    ASSIGN_OR_REFUSE(costs, executable.executable->GetCostAnalysis());
    executable.cost_names.reserve(costs.size());
    for (const auto& [name, value] : costs) {
      const float* number = std::get_if<float>(&value);
      if (number == nullptr) continue;
      executable.cost_names.push_back(name);
      PJRT_NamedValue named{};
      named.struct_size = PJRT_NamedValue_STRUCT_SIZE;
      named.name = executable.cost_names.back().data();
      named.name_size = name.size();
      named.type = PJRT_NamedValue_kFloat;
      named.float_value = *number;
      named.value_size = 1;
      executable.costs.push_back(named);
    }
  }
  args->properties = executable.costs.data();
  args->num_properties = executable.costs.size();
  return nullptr;
}

PJRT_Error* ExecutableSerialize(PJRT_Executable_Serialize_Args* args) {
  CHECK_SIZE(PJRT_Executable_Serialize_Args);
  ASSIGN_OR_REFUSE(bytes, args->executable->executable->SerializeExecutable());
  auto* made = new PJRT_SerializedExecutable();
  made->bytes = std::move(bytes);
  args->serialized_bytes = made->bytes.data();
  args->serialized_bytes_size = made->bytes.size();
  args->serialized_executable = made;
  args->serialized_executable_deleter = [](PJRT_SerializedExecutable* made) { delete made; };
  return nullptr;
}

// ---- the table

PJRT_Error* Unimplemented(void*) { return new PJRT_Error(absl::UnimplementedError("this plugin does not have the call")); }

PJRT_Api MakeApi() {
  PJRT_Api api{};
  for (void** entry = reinterpret_cast<void**>(&api.PJRT_Error_Destroy); entry != reinterpret_cast<void**>(&api + 1); ++entry) {
    *entry = reinterpret_cast<void*>(&Unimplemented);
  }
  api.struct_size = PJRT_Api_STRUCT_SIZE;
  api.pjrt_api_version.struct_size = PJRT_Api_Version_STRUCT_SIZE;
  api.pjrt_api_version.major_version = PJRT_API_MAJOR;
  api.pjrt_api_version.minor_version = PJRT_API_MINOR;
  api.PJRT_Error_Destroy = ErrorDestroy;
  api.PJRT_Error_Message = ErrorMessage;
  api.PJRT_Error_GetCode = ErrorGetCode;
  api.PJRT_Plugin_Initialize = PluginInitialize;
  api.PJRT_Plugin_Attributes = PluginAttributes;
  api.PJRT_Event_Destroy = EventDestroy;
  api.PJRT_Event_IsReady = EventIsReady;
  api.PJRT_Event_Error = EventError;
  api.PJRT_Event_Await = EventAwait;
  api.PJRT_Event_OnReady = EventOnReady;
  api.PJRT_Client_Create = ClientCreate;
  api.PJRT_Client_Destroy = ClientDestroy;
  api.PJRT_Client_PlatformName = ClientPlatformName;
  api.PJRT_Client_PlatformVersion = ClientPlatformVersion;
  api.PJRT_Client_ProcessIndex = ClientProcessIndex;
  api.PJRT_Client_Devices = ClientDevices;
  api.PJRT_Client_AddressableDevices = ClientAddressableDevices;
  api.PJRT_Client_LookupDevice = ClientLookupDevice;
  api.PJRT_Client_Compile = ClientCompile;
  api.PJRT_Client_BufferFromHostBuffer = BufferFromHostBuffer;
  api.PJRT_DeviceDescription_Id = DescriptionId;
  api.PJRT_DeviceDescription_ProcessIndex = DescriptionProcessIndex;
  api.PJRT_DeviceDescription_Kind = DescriptionKind;
  api.PJRT_DeviceDescription_DebugString = DescriptionDebugString;
  api.PJRT_Device_GetDescription = DeviceGetDescription;
  api.PJRT_Device_IsAddressable = DeviceIsAddressable;
  api.PJRT_Device_LocalHardwareId = DeviceLocalHardwareId;
  api.PJRT_Executable_Destroy = ExecutableDestroy;
  api.PJRT_Executable_Name = ExecutableName;
  api.PJRT_Executable_NumReplicas = ExecutableNumReplicas;
  api.PJRT_Executable_NumPartitions = ExecutableNumPartitions;
  api.PJRT_Executable_NumOutputs = ExecutableNumOutputs;
  api.PJRT_Executable_SizeOfGeneratedCodeInBytes = ExecutableCodeSize;
  api.PJRT_Executable_GetCostAnalysis = ExecutableCost;
  api.PJRT_Executable_Serialize = ExecutableSerialize;
  api.PJRT_Executable_OutputElementTypes = ExecutableOutputElementTypes;
  api.PJRT_Executable_OutputDimensions = ExecutableOutputDimensions;
  api.PJRT_Executable_GetCompiledMemoryStats = ExecutableMemory;
  api.PJRT_LoadedExecutable_Destroy = LoadedDestroy;
  api.PJRT_LoadedExecutable_GetExecutable = LoadedGetExecutable;
  api.PJRT_LoadedExecutable_Execute = LoadedExecute;
  api.PJRT_Buffer_Destroy = BufferDestroy;
  api.PJRT_Buffer_ElementType = BufferElementType;
  api.PJRT_Buffer_Dimensions = BufferDimensions;
  api.PJRT_Buffer_OnDeviceSizeInBytes = BufferOnDeviceSize;
  api.PJRT_Buffer_Device = BufferDevice;
  api.PJRT_Buffer_Delete = BufferDelete;
  api.PJRT_Buffer_IsDeleted = BufferIsDeleted;
  api.PJRT_Buffer_CopyToDevice = BufferCopyToDevice;
  api.PJRT_Buffer_ToHostBuffer = BufferToHostBuffer;
  api.PJRT_Buffer_IsOnCpu = BufferIsOnCpu;
  api.PJRT_Buffer_ReadyEvent = BufferReadyEvent;
  return api;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const PJRT_Api* GetPjrtApi() {
  static const PJRT_Api api = MakeApi();
  return &api;
}

__attribute__((visibility("default"))) int64_t fused_xent_live_objects() { return live_objects; }
}
