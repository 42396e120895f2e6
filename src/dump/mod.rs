//! The dump format: what a capture leaves on disk, and how it is read and written. See `docs/format.md`.
//!
//! ```text
//! <dump>/proc_00000/step_00000000/{shared, mb_0000, …}/{manifest.json, hidden.0.npy, …}
//! ```
//! [`Dump::open`] reads the manifests and merges what the processes wrote; [`Folder::load`] maps and checks a tensor;
//! [`Step::problem`] makes a microbatch's inputs a [`Problem`](fused_xent_kernels::problem::Problem). [`FolderWriter`] writes
//! a folder at once. [`verify()`] checks everything. Whatever a dump holds, reading it ends in a value or a [`DumpError`].

mod error;
mod folder;
mod json;
mod manifest;
mod microbatch;
mod names;
mod npy;
mod payload;
mod read;
mod settings;
mod shards;
mod tensor;
mod verify;
mod write;

pub use error::{Culprit, DumpError, DumpErrorKind};
pub use folder::{Folder, TensorInfo};
pub use manifest::FolderId;
pub(crate) use manifest::check_contract;
pub use microbatch::LoadedMicrobatch;
pub use names::{ElementType, ShapeRule, TENSORS, TensorSpec, tensor_spec};
pub use payload::ShardInfo;
pub use read::{Dump, Incomplete, Run, Step, find_dumps};
pub use settings::{LossSettings, MicrobatchGradients};
pub use shards::Region;
pub use tensor::{Recorded, ReplicaCopy, Tensor};
pub use verify::{VerifyReport, verify};
pub use write::{Elements, FolderWriter, Placement};
