//! From a checkpoint to a model, one tensor at a time.
//!
//! Each weight is read from the memory-mapped file, checked, quantized if asked, and dropped before the next one is
//! read: besides the finished model, host memory holds no more than one tensor in its stored precision.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use qlora_kernels::cuda::CudaWeight;
use qlora_kernels::ops::attention::AttentionConfig;
use qlora_kernels::quant::{IntConfig, QuantConfig, Quantized4bit, QuantizedInt};
use qlora_kernels::weight::{FrozenWeight, Int8Activations, PlainData, PlainWeight};
use qlora_kernels::{Matrix, Workspace};

use super::block::{Block, MemoryPolicy};
use super::causal_lm::CausalLm;
use super::projection::Projection;
use super::stack::Stack;
use crate::config::CheckpointQuantization;
use crate::error::{Error, Result};
use crate::source::{PlainTensor, SourceWeight, WeightSource};

/// How the frozen projections are held. A checkpoint that is stored quantized is always held as it is stored, its plain
/// layers too: with one, [`Quantization::None`] or what it is stored in are the only values that are not refused.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Quantization {
    /// As stored: LoRA without quantization.
    #[default]
    None,
    /// 4-bit, as bitsandbytes does it.
    Bits4(QuantConfig),
    /// LLM.int8, as bitsandbytes does it: weights and activations in 8 bits, outlier activations (from 6.0 on) exact.
    Int8,
    /// Uniform 4- or 8-bit integers.
    Int(IntConfig),
}

/// What loading can be told.
#[derive(Default)]
pub struct LoadOptions<'a> {
    /// How the projections are held. Embeddings, norms and the head stay as stored.
    pub quantization: Quantization,
    /// Leave the embedding's table in host memory: only the rows of a batch go to the GPU. A head that is tied to it is
    /// on the GPU in any case.
    pub offload_embedding: bool,
    /// Called after each tensor with the number of tensors done and their total.
    pub progress: Option<&'a mut dyn FnMut(usize, usize)>,
}

impl CausalLm {
    /// Reads a model.
    ///
    /// # Errors
    /// If a tensor is missing, superfluous or has the wrong shape, or holds a value that is not finite; the message
    /// names it.
    pub fn load(source: &dyn WeightSource, options: LoadOptions<'_>) -> Result<Self> {
        Self::load_on(source, options, Workspace::new(&candle_core::Device::Cpu)?)
    }

    /// [`Self::load`] onto the device of `workspace`, computing in its type. On a GPU, weights are quantized there.
    ///
    /// # Errors
    /// As there; also if the device's memory does not hold the model.
    pub fn load_on(source: &dyn WeightSource, options: LoadOptions<'_>, workspace: Workspace) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let gpu = workspace.gpu().cloned();
        let model = Loader { source, options, used: Vec::new(), total: source.names().len(), workspace }.model();
        #[cfg(feature = "cuda")]
        if let Some(gpu) = gpu {
            gpu.release_staging();
        }
        model
    }
}

struct Loader<'a, 'b> {
    source: &'a dyn WeightSource,
    options: LoadOptions<'b>,
    used: Vec<String>,
    total: usize,
    workspace: Workspace,
}

impl Loader<'_, '_> {
    fn model(mut self) -> Result<CausalLm> {
        if let Some(stored) = self.source.quantization() {
            check_quantization(self.options.quantization, stored, self.source)?;
            self.options.quantization = Quantization::None;
        }
        let config = self.source.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = match self.options.offload_embedding {
            false => self.plain("model.embed_tokens.weight", vocab, hidden)?,
            true => {
                let data = self.read("model.embed_tokens.weight", &[vocab, hidden])?;
                check_finite("model.embed_tokens.weight", &data)?;
                Arc::new(PlainWeight::new(data, vocab, hidden))
            }
        };
        let blocks = (0..config.num_hidden_layers).map(|layer| self.block(layer)).collect::<Result<Vec<_>>>()?;
        let final_norm = self.vector("model.norm.weight", hidden)?;
        let head = match (config.tie_word_embeddings, self.options.offload_embedding) {
            (false, _) => self.plain("lm_head.weight", vocab, hidden)?,
            (true, false) => embedding.clone(),
            (true, true) => self.plain("model.embed_tokens.weight", vocab, hidden)?,
        };
        self.check_all_used(config.tie_word_embeddings)?;
        let limit = config.max_position_embeddings;
        let stack = Stack::new(blocks, final_norm, config.rms_norm_eps, config.rope.clone(), limit)?;
        Ok(CausalLm::new(config, embedding, head, stack, self.workspace))
    }

    fn block(&mut self, layer: usize) -> Result<Block> {
        let config = self.source.config().clone();
        let (hidden, mlp, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q_width, kv_width) = (config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim);
        let prefix = format!("model.layers.{layer}");
        let name = |part: &str| format!("{prefix}.{part}");
        let attention = AttentionConfig {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: config.sliding_window.get(layer).copied().flatten(),
        };
        let qk_norm = match config.qk_norm {
            true => Some((
                self.vector(&name("self_attn.q_norm.weight"), head_dim)?,
                self.vector(&name("self_attn.k_norm.weight"), head_dim)?,
            )),
            false => None,
        };
        Ok(Block {
            input_norm: self.vector(&name("input_layernorm.weight"), hidden)?,
            post_attention_norm: self.vector(&name("post_attention_layernorm.weight"), hidden)?,
            qk_norm,
            eps: config.rms_norm_eps,
            attention,
            q: self.projection(name("self_attn.q_proj"), q_width, hidden, config.qkv_bias)?,
            k: self.projection(name("self_attn.k_proj"), kv_width, hidden, config.qkv_bias)?,
            v: self.projection(name("self_attn.v_proj"), kv_width, hidden, config.qkv_bias)?,
            o: self.projection(name("self_attn.o_proj"), hidden, q_width, config.o_bias)?,
            gate: self.projection(name("mlp.gate_proj"), mlp, hidden, config.mlp_bias)?,
            up: self.projection(name("mlp.up_proj"), mlp, hidden, config.mlp_bias)?,
            down: self.projection(name("mlp.down_proj"), hidden, mlp, config.mlp_bias)?,
            policy: MemoryPolicy::default(),
        })
    }

    fn projection(&mut self, name: String, rows: usize, cols: usize, bias: bool) -> Result<Projection> {
        let weight_name = format!("{name}.weight");
        let weight = match (self.read_weight(&weight_name, &[rows, cols])?, self.options.quantization) {
            (weight, Quantization::None) => self.place(&weight_name, weight)?,
            (SourceWeight::Plain(PlainTensor { data, .. }), quantization) => self
                .quantize(&data, rows, cols, quantization)
                .map_err(|error| Error::tensor(&weight_name, error.to_string()))?,
            // `model` saw to it.
            (packed, _) => self.place(&weight_name, packed)?,
        };
        let bias = bias.then(|| self.vector(&format!("{name}.bias"), rows)).transpose()?;
        Projection::new(name, weight, bias)
    }

    /// Quantizes on the device that the weight is for.
    fn quantize(
        &self,
        data: &PlainData,
        rows: usize,
        cols: usize,
        quantization: Quantization,
    ) -> Result<Arc<dyn FrozenWeight>> {
        match quantization {
            Quantization::None => self.place_plain(PlainWeight::new(data.clone(), rows, cols)),
            #[cfg(feature = "cuda")]
            Quantization::Bits4(config) if self.workspace.gpu().is_some() => {
                Ok(Arc::new(CudaWeight::quantize(data, rows, cols, &config, &self.workspace)?))
            }
            Quantization::Bits4(config) => Ok(Arc::new(Quantized4bit::quantize(data, rows, cols, &config)?)),
            Quantization::Int8 => {
                self.place_int(|| QuantizedInt::llm_int8(data, rows, cols, Int8Activations::THRESHOLD, &[]))
            }
            Quantization::Int(config) => self.place_int(|| QuantizedInt::quantize(data, rows, cols, &config)),
        }
    }

    /// A weight on the device in the form it has.
    fn place(&self, name: &str, weight: SourceWeight) -> Result<Arc<dyn FrozenWeight>> {
        match weight {
            SourceWeight::Plain(tensor) => {
                check_finite(name, &tensor.data)?;
                self.place_plain(tensor.into_weight(name)?)
            }
            #[cfg(feature = "cuda")]
            SourceWeight::FourBit(weight) if self.workspace.gpu().is_some() => {
                Ok(Arc::new(CudaWeight::quantized(&weight, &self.workspace)?))
            }
            SourceWeight::FourBit(weight) => Ok(Arc::new(weight)),
            SourceWeight::Int(weight) => self.place_int(|| Ok(weight)),
        }
    }

    fn place_int(&self, weight: impl FnOnce() -> qlora_kernels::Result<QuantizedInt>) -> Result<Arc<dyn FrozenWeight>> {
        let weight = weight()?;
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::integers(&weight, &self.workspace)?));
        }
        Ok(Arc::new(weight))
    }

    fn place_plain(&self, weight: PlainWeight) -> Result<Arc<dyn FrozenWeight>> {
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::plain(&weight, &self.workspace)?));
        }
        Ok(Arc::new(weight))
    }

    /// A table that is not quantized while loading; a head may be stored quantized.
    fn plain(&mut self, name: &str, rows: usize, cols: usize) -> Result<Arc<dyn FrozenWeight>> {
        let weight = self.read_weight(name, &[rows, cols])?;
        self.place(name, weight)
    }

    /// One f32 row on the device.
    fn vector(&mut self, name: &str, len: usize) -> Result<Matrix> {
        let data = self.read(name, &[len])?;
        check_finite(name, &data)?;
        let mut values = vec![0.0; len];
        data.to_f32(0..len, &mut values);
        Ok(self.workspace.upload(&values, 1, len)?)
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<PlainData> {
        let tensor = self.source.read(name)?;
        self.done(name, &tensor.shape, shape)?;
        Ok(tensor.data)
    }

    fn read_weight(&mut self, name: &str, shape: &[usize]) -> Result<SourceWeight> {
        let weight = self.source.read_weight(name)?;
        self.done(name, &weight.shape(), shape)?;
        Ok(weight)
    }

    fn done(&mut self, name: &str, got: &[usize], shape: &[usize]) -> Result<()> {
        if got != shape {
            let message = format!("has shape {got:?}, the configuration asks for {shape:?}");
            return Err(Error::tensor(name, message));
        }
        self.used.push(name.to_owned());
        if let Some(progress) = &mut self.options.progress {
            progress(self.used.len(), self.total.max(self.used.len()));
        }
        Ok(())
    }

    /// A tensor that nothing reads means that the model is not what its configuration says.
    fn check_all_used(&self, tied: bool) -> Result<()> {
        let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
        let used: std::collections::HashSet<_> = self.used.iter().collect();
        let unused: Vec<_> =
            self.source.names().into_iter().filter(|name| !used.contains(name) && !harmless(name)).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let shown = unused.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        let more = if unused.len() > 5 { format!(" and {} more", unused.len() - 5) } else { String::new() };
        Err(Error::Unsupported(format!(
            "the checkpoint has tensors that this architecture does not use: {shown}{more}"
        )))
    }
}

/// Quantizing what is quantized already would lose precision without saying so.
fn check_quantization(asked: Quantization, stored: &CheckpointQuantization, source: &dyn WeightSource) -> Result<()> {
    let asked = match (asked, stored) {
        (Quantization::None, _)
        | (Quantization::Bits4(_), CheckpointQuantization::Bnb4bit)
        | (Quantization::Int8, CheckpointQuantization::Bnb8bit { .. }) => return Ok(()),
        (Quantization::Bits4(config), _) => config.quant_type.to_string(),
        (Quantization::Int8, _) => "LLM.int8".to_owned(),
        (Quantization::Int(config), _) => format!("{}-bit integers", config.bits.bits()),
    };
    Err(Error::Invalid(format!(
        "{}: the weights are stored in {stored} and cannot be quantized again to {asked} without loss: load them without \
         quantization (they stay as they are stored; `load_in_4bit = false`), or take the original bf16, f16 or f32 weights",
        source.path().display()
    )))
}

fn check_finite(name: &str, data: &PlainData) -> Result<()> {
    let position = match data {
        PlainData::F32(data) => data.iter().position(|x| !x.is_finite()),
        PlainData::Bf16(data) => data.iter().position(|x| !x.is_finite()),
        PlainData::F16(data) => data.iter().position(|x| !x.is_finite()),
    };
    match position {
        None => Ok(()),
        Some(index) => Err(Error::tensor(name, format!("element {index} is not finite (NaN or infinity)"))),
    }
}
