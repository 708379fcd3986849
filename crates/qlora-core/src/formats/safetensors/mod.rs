//! safetensors: one file tensor by tensor ([`write_safetensors`]), a model in shards ([`SafetensorsStream`]), and reading.

mod file;
pub(crate) mod shard;
mod stream;

pub use file::write_safetensors;
pub use stream::SafetensorsStream;
pub(crate) use stream::disk;
