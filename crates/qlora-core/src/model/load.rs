//! From a checkpoint to a model, one tensor at a time.
//!
//! Each weight is read from the memory-mapped file, checked, quantized if asked, and dropped before the next one is
//! read: besides the finished model, host memory holds no more than one tensor in its stored precision.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use qlora_kernels::cuda::CudaWeight;
use qlora_kernels::ops::attention::AttentionConfig;
use qlora_kernels::quant::{QuantConfig, Quantized4bit};
use qlora_kernels::weight::{FrozenWeight, PlainData, PlainWeight};
use qlora_kernels::{Matrix, Workspace};

use super::block::{Block, MemoryPolicy};
use super::causal_lm::CausalLm;
use super::projection::Projection;
use super::stack::Stack;
use crate::error::{Error, Result};
use crate::source::WeightSource;

/// How the frozen projections are held.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Quantization {
    /// As stored: LoRA without quantization.
    #[default]
    None,
    /// 4-bit, as bitsandbytes does it.
    Bits4(QuantConfig),
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
        Loader { source, options, used: Vec::new(), total: source.names().len(), workspace }.model()
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
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.workspace.gpu() {
            gpu.release_staging();
        }
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
        let data = self.read(&weight_name, &[rows, cols])?;
        let weight = match self.options.quantization {
            Quantization::None => {
                check_finite(&weight_name, &data)?;
                self.place_plain(PlainWeight::new(data, rows, cols))?
            }
            Quantization::Bits4(config) => self
                .quantize(&data, rows, cols, &config)
                .map_err(|error| Error::tensor(&weight_name, error.to_string()))?,
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
        config: &QuantConfig,
    ) -> qlora_kernels::Result<Arc<dyn FrozenWeight>> {
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::quantize(data, rows, cols, config, &self.workspace)?));
        }
        Ok(Arc::new(Quantized4bit::quantize(data, rows, cols, config)?))
    }

    fn place_plain(&self, weight: PlainWeight) -> Result<Arc<dyn FrozenWeight>> {
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::plain(&weight, &self.workspace)?));
        }
        Ok(Arc::new(weight))
    }

    fn plain(&mut self, name: &str, rows: usize, cols: usize) -> Result<Arc<dyn FrozenWeight>> {
        let data = self.read(name, &[rows, cols])?;
        check_finite(name, &data)?;
        self.place_plain(PlainWeight::new(data, rows, cols))
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
        if tensor.shape != shape {
            let message = format!("has shape {:?}, the configuration asks for {shape:?}", tensor.shape);
            return Err(Error::tensor(name, message));
        }
        self.used.push(name.to_owned());
        if let Some(progress) = &mut self.options.progress {
            progress(self.used.len(), self.total.max(self.used.len()));
        }
        Ok(tensor.data)
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
