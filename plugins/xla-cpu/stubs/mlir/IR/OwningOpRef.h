// XLA's client headers name these types in signatures that the plugin does not call. LLVM's own headers are not in the wheel.
#ifndef FUSED_XENT_STUB_MLIR
#define FUSED_XENT_STUB_MLIR
namespace mlir {
class Operation;
class MLIRContext;
class ModuleOp {
  Operation* state;
};
template <class T>
class OwningOpRef {
  T op;
};
}  // namespace mlir
#endif
