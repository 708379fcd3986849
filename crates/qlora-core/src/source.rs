//! TEMP
use qlora_kernels::weight::PlainData;
/// t
pub struct PlainTensor {
    /// t
    pub data: PlainData,
    /// t
    pub shape: Vec<usize>,
}
/// t
pub trait WeightSource {
    /// t
    fn config(&self) -> &crate::config::ModelConfig;
    /// t
    fn names(&self) -> Vec<String>;
    /// t
    fn read(&self, name: &str) -> crate::Result<PlainTensor>;
}
