//! Reads an adapter of any kind of PEFT's LoRA, for inference.
//!
//! Tensors, after `base_model.model.` and a module's name (PEFT 0.21.2, `get_peft_model_state_dict`):
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `lora_A.weight`, `lora_B.weight` | `[r, in]`, `[out, r]` | linear layers |
//! | `lora_embedding_A`, `lora_embedding_B` | `[r, vocabulary]`, `[hidden, r]` | the embedding |
//! | `lora_B.bias` | `[out]` | `lora_bias` |
//! | `lora_magnitude_vector` | `[out]` | DoRA |
//! | `token_adapter.trainable_tokens_delta` | `[tokens, hidden]` | new rows, not differences |
//! | `weight`, `bias` | as the base's | `modules_to_save`; `bias = "all"` |
//! | `base_layer.weight`, `base_layer.bias` | as the base's | an embedding saved with its adapter; trained biases |
//!
//! The options say which of them there are; any other, or one that is missing, is an error that lists it.

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use qlora_kernels::weight::PlainData;
use safetensors::Dtype;

use super::CONFIG_FILE;
use super::config_file::{self, AdapterConfig};
use super::keys::{AdapterFile, wrong_shape};
use super::kinds::{AdapterKinds, EMBEDDING, HEAD, TrainedBias};
use super::load::{difference, read_file};
use super::weights::Weights;
use crate::config::ModelConfig;
use crate::lora::LinearModule;
use crate::{Error, Result};

/// An adapter from disk, of any kind, with all that is needed to run it over its base.
#[derive(Clone, Debug)]
pub struct PeftAdapter {
    /// Its options, and the base model that it names.
    pub config: AdapterConfig,
    /// The adapted parameters other than the A and B of linear layers.
    pub kinds: AdapterKinds,
    /// The modules with A and B, in the model's order; among them possibly `lm_head` and `model.embed_tokens`.
    pub modules: Vec<LoraModule>,
    /// Rows of the embedding and the head.
    pub tokens: Vec<TokenRows>,
    /// Tensors in place of the base's.
    pub replaced: Vec<Replaced>,
    /// Rows of the tables that it brings along, where they are not as many as its base has: tokens were added (or taken away) before
    /// it was trained. [`ModelFiles::with_vocabulary_of`](crate::open::ModelFiles::with_vocabulary_of) gives the base as many.
    pub vocab_size: Option<usize>,
}

/// The adapter of one module: A and B with their rank and scaling, and its bias and magnitude if it has them.
#[derive(Clone, Debug)]
pub struct LoraModule {
    /// Its name in the model.
    pub name: String,
    /// Rows of A.
    pub rank: usize,
    /// The factor of the product of A and B.
    pub scaling: f64,
    /// `[r, in]`; `[r, vocabulary]` for the embedding.
    pub a: Vec<f32>,
    /// `[out, r]`; `[hidden, r]` for the embedding.
    pub b: Vec<f32>,
    /// B's bias `[out]`, which is scaled too.
    pub bias: Option<Vec<f32>>,
    /// DoRA's magnitude `[out]`.
    pub magnitude: Option<Vec<f32>>,
}

/// Rows in place of the base's.
#[derive(Clone, Debug)]
pub struct TokenRows {
    /// `model.embed_tokens` or `lm_head`.
    pub module: String,
    /// The tokens.
    pub ids: Vec<u32>,
    /// `[tokens, hidden]`.
    pub rows: Vec<f32>,
}

/// A tensor in place of the base's.
#[derive(Clone)]
pub struct Replaced {
    /// Its name in the model: `model.norm.weight`.
    pub name: String,
    /// Its elements, as they are in the file.
    pub data: PlainData,
    /// Its shape.
    pub shape: Vec<usize>,
    /// It is the base's own, saved along: a tied head follows it.
    pub is_base: bool,
}

impl std::fmt::Debug for Replaced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Replaced({} {:?})", self.name, self.shape)
    }
}

/// Reads the adapter in the folder `dir` for `model`, of whatever kind.
///
/// # Errors
/// If a file is missing or broken, if an option is not supported, or if the tensors are not exactly those that the options
/// give for this model, in F32, F16 or BF16, with the right shapes and finite numbers.
pub fn open_folder(dir: impl AsRef<Path>, model: &ModelConfig) -> Result<PeftAdapter> {
    let dir = dir.as_ref();
    let path = dir.join(CONFIG_FILE);
    let (config, kinds) = config_file::parse_any(&path, &read_file(&path)?)?;
    let (path, file) = Weights::open(dir)?;
    assemble(&path, config, kinds, &file, model)
}

/// The adapter of these options and this tensor file; `path` is for messages.
pub(super) fn assemble(
    path: &Path,
    config: AdapterConfig,
    kinds: AdapterKinds,
    file: &[u8],
    model: &ModelConfig,
) -> Result<PeftAdapter> {
    let file = AdapterFile::parse(path, file)?;
    let vocab_size = vocabulary(&file, &kinds, model);
    let resized = vocab_size.map(|vocab_size| ModelConfig { vocab_size, ..model.clone() });
    let model = resized.as_ref().unwrap_or(model);
    let expected = Expected::new(path, &config, &kinds, model)?;
    expected.check(path, &file)?;
    let reader = Reader { path, file: &file };

    let mut modules = Vec::with_capacity(expected.modules.len());
    for module in &expected.modules {
        let key = |end: &str| format!("{PREFIX}{}.{end}", module.name);
        let (rank, scaling) = (config.lora.rank_of(&module.name), config.lora.scaling_of(&module.name));
        let [a, b] = factor_names(&module.name);
        if !expected.tensors[&key(a)].required && file.tensor(&key(a)).is_none() {
            continue;
        }
        let [a, b] = [a, b].map(|end| reader.f32(&key(end)));
        modules.push(LoraModule {
            name: module.name.clone(),
            rank,
            scaling,
            a: a?,
            b: b?,
            bias: kinds.lora_bias.then(|| reader.f32(&key("lora_B.bias"))).transpose()?,
            magnitude: config.lora.use_dora.then(|| reader.f32(&key("lora_magnitude_vector"))).transpose()?,
        });
    }
    let mut tokens = Vec::new();
    for (module, ids) in expected.tokens {
        let rows = reader.f32(&format!("{PREFIX}{module}.{TOKEN_ROWS}"))?;
        tokens.push(TokenRows { module, ids, rows });
    }
    let mut replaced = Vec::new();
    for (key, tensor) in &expected.tensors {
        if let (Some(name), Some(data)) = (&tensor.replaces, reader.plain(key)?) {
            let (name, is_base) = (name.clone(), tensor.is_base);
            replaced.push(Replaced { name, data, shape: tensor.shape.clone(), is_base });
        }
    }
    Ok(PeftAdapter { config, kinds, modules, tokens, replaced, vocab_size })
}

/// The rows of the tables in the file, where they are others than the model's: PEFT saves both tables once the vocabulary was
/// resized, and of a tied model at least the embedding.
fn vocabulary(file: &AdapterFile, kinds: &AdapterKinds, model: &ModelConfig) -> Option<usize> {
    let rows = |module: &str| {
        let table =
            ["weight", "base_layer.weight"].iter().find_map(|end| file.tensor(&format!("{PREFIX}{module}.{end}")))?;
        match *table.shape() {
            [rows, cols] if cols == model.hidden_size => Some(rows),
            _ => None,
        }
    };
    let follows = model.tie_word_embeddings && (kinds.ensure_weight_tying || !kinds.saves(EMBEDDING));
    let found = match (rows(EMBEDDING)?, rows(HEAD)) {
        (embedding, Some(head)) if embedding == head => embedding,
        (embedding, None) if follows => embedding,
        _ => return None,
    };
    (found != model.vocab_size && found > 0).then_some(found)
}

pub(super) const PREFIX: &str = "base_model.model.";
pub(super) const TOKEN_ROWS: &str = "token_adapter.trainable_tokens_delta";

/// The tensor names of A and B, without the module's name.
pub(super) fn factor_names(module: &str) -> [&'static str; 2] {
    match module {
        EMBEDDING => ["lora_embedding_A", "lora_embedding_B"],
        _ => ["lora_A.weight", "lora_B.weight"],
    }
}

/// The tensors that a file has to have or may have.
struct Expected {
    modules: Vec<LinearModule>,
    tokens: Vec<(String, Vec<u32>)>,
    tensors: BTreeMap<String, Tensor>,
}

struct Tensor {
    shape: Vec<usize>,
    required: bool,
    /// The tensor of the base whose place it takes.
    replaces: Option<String>,
    is_base: bool,
}

impl Expected {
    fn new(path: &Path, config: &AdapterConfig, kinds: &AdapterKinds, model: &ModelConfig) -> Result<Self> {
        let mut modules = kinds.resolve(config, model);
        let mut this = Self { modules: Vec::new(), tokens: Vec::new(), tensors: BTreeMap::new() };
        for module in &modules {
            let rank = config.lora.rank_of(&module.name);
            let [a, b] = factor_names(&module.name);
            this.require(&module.name, a, &[rank, module.in_features]);
            this.require(&module.name, b, &[module.out_features, rank]);
            if kinds.lora_bias && module.name == EMBEDDING {
                return Err(Error::Unsupported(format!("{}: lora_bias on {EMBEDDING}", path.display())));
            }
            if kinds.lora_bias {
                this.require(&module.name, "lora_B.bias", &[module.out_features]);
            }
            if config.lora.use_dora {
                this.require(&module.name, "lora_magnitude_vector", &[module.out_features]);
            }
        }
        // The tied head's A and B are the embedding's, and stored once more.
        let tied_head = kinds.ensure_weight_tying
            && model.tie_word_embeddings
            && modules.iter().any(|module| module.name == EMBEDDING)
            && modules.iter().all(|module| module.name != HEAD);
        if tied_head {
            let (vocab, hidden) = (model.vocab_size, model.hidden_size);
            let rank = config.lora.rank_of(HEAD);
            this.require(HEAD, "lora_A.weight", &[rank, hidden]);
            this.require(HEAD, "lora_B.weight", &[vocab, rank]);
            for end in ["lora_A.weight", "lora_B.weight"] {
                if let Some(tensor) = this.tensors.get_mut(&format!("{PREFIX}{HEAD}.{end}")) {
                    tensor.required = false;
                }
            }
            modules.push(LinearModule { name: HEAD.to_owned(), out_features: vocab, in_features: hidden });
        }
        let adapted = |module: &str| modules.iter().any(|other| other.name == module);
        this.tokens(path, kinds, model, adapted)?;
        this.base_tensors(kinds, model, adapted);
        if this.tensors.values().all(|tensor| !tensor.required) {
            let message = "target_modules selects nothing that this model has; was the adapter made for another model?";
            return Err(Error::format(path.with_file_name(CONFIG_FILE), message));
        }
        this.modules = modules;
        Ok(this)
    }

    fn require(&mut self, module: &str, end: &str, shape: &[usize]) {
        let tensor = Tensor { shape: shape.to_vec(), required: true, replaces: None, is_base: false };
        self.tensors.insert(format!("{PREFIX}{module}.{end}"), tensor);
    }

    fn tokens(
        &mut self,
        path: &Path,
        kinds: &AdapterKinds,
        model: &ModelConfig,
        adapted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        for (entry, ids) in &kinds.trainable_token_indices {
            let wrong = |message: String| Err(Error::format(path.with_file_name(CONFIG_FILE), message));
            let modules: Vec<&str> =
                [EMBEDDING, HEAD].into_iter().filter(|name| name.ends_with(entry.as_str())).collect();
            let [module] = modules[..] else {
                return wrong(format!("trainable_token_indices: {entry:?} is neither {EMBEDDING} nor {HEAD}"));
            };
            if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab_size) {
                return wrong(format!(
                    "trainable_token_indices: {id} is beyond the vocabulary of {}",
                    model.vocab_size
                ));
            }
            if adapted(module) || kinds.saves(module) || self.tokens.iter().any(|(other, _)| other == module) {
                return wrong(format!("{module} is adapted in two ways at once"));
            }
            if module == HEAD && model.tie_word_embeddings {
                // The rows of a tied head are the embedding's and are stored there.
                continue;
            }
            self.require(module, TOKEN_ROWS, &[ids.len(), model.hidden_size]);
            self.tokens.push((module.to_owned(), ids.clone()));
        }
        Ok(())
    }

    /// The tensors that take the place of the base's.
    fn base_tensors(&mut self, kinds: &AdapterKinds, model: &ModelConfig, adapted: impl Fn(&str) -> bool) {
        let mut tensors = model.tensor_shapes();
        let head_weight = format!("{HEAD}.weight");
        if model.tie_word_embeddings {
            tensors.push((head_weight.clone(), vec![model.vocab_size, model.hidden_size]));
        }
        for (name, shape) in tensors {
            let Some((module, end)) = name.rsplit_once('.') else { continue };
            let saved = kinds.saves(module);
            let embedding = module == EMBEDDING || module == HEAD;
            let bias = match kinds.bias {
                TrainedBias::None => false,
                TrainedBias::All => end == "bias",
                TrainedBias::LoraOnly => end == "bias" && adapted(module),
            };
            // Embeddings may be saved along (`save_embedding_layers`), which changes nothing but what they hold.
            if !saved && !bias && !embedding {
                continue;
            }
            // With ensure_weight_tying, the tied head may be left to the embedding.
            let optional_head = kinds.ensure_weight_tying && model.tie_word_embeddings && module == HEAD;
            let key = match adapted(module) {
                true => format!("{PREFIX}{module}.base_layer.{end}"),
                false => format!("{PREFIX}{name}"),
            };
            let required = (saved || bias) && !optional_head;
            self.tensors.insert(key, Tensor { shape, required, replaces: Some(name), is_base: !saved && !bias });
        }
    }

    /// Names first, then shapes and dtypes, then numbers.
    fn check(&self, path: &Path, file: &AdapterFile) -> Result<()> {
        let unexpected: Vec<&str> = file.names().filter(|name| !self.tensors.contains_key(*name)).collect();
        let unexpected: Vec<&str> = unexpected.into_iter().map(|name| file.stored_name(name)).collect();
        let required = || self.tensors.iter().filter(|(_, tensor)| tensor.required).map(|(name, _)| name.as_str());
        let missing: Vec<&str> = required().filter(|name| file.tensor(name).is_none()).collect();
        if !missing.is_empty() || !unexpected.is_empty() {
            return Err(difference(path, &missing, &unexpected, required().count()));
        }
        let [a, b] = factor_names(HEAD).map(|end| format!("{PREFIX}{HEAD}.{end}"));
        if self.tensors.contains_key(&a) && file.tensor(&a).is_some() != file.tensor(&b).is_some() {
            let missing = if file.tensor(&a).is_some() { &b } else { &a };
            return Err(difference(path, &[missing], &[], 0));
        }
        for (name, tensor) in &self.tensors {
            let Some(view) = file.tensor(name) else { continue };
            let error =
                |message: String| Error::tensor(file.stored_name(name), format!("{message} (in {})", path.display()));
            if view.shape() != tensor.shape {
                let (shape, want) = (view.shape(), &tensor.shape);
                let whole = name.ends_with("weight") && tensor.replaces.is_some();
                let hint = if whole && shape.len() == 2 && shape[1] == want[1] && shape[0] != want[0] {
                    "; an adapter that resizes the vocabulary needs both tables with as many rows, as PEFT saves them \
                     (save_embedding_layers): save it again so, or merge it into its base with PEFT (merge_and_unload)"
                } else {
                    ""
                };
                return Err(error(format!("{}{hint}", wrong_shape(shape, want))));
            }
            if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(error(format!("has dtype {:?}; adapters are F32, F16 or BF16", view.dtype())));
            }
            let data = plain(view.dtype(), view.data());
            if let Some(index) = data.first_non_finite() {
                let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
                let place = format!("row {}, column {}", index / columns, index % columns);
                let mut value = [0.0];
                data.to_f32(index..index + 1, &mut value);
                return Err(error(format!("holds {} at {place}", value[0])));
            }
        }
        Ok(())
    }
}

/// Reads checked tensors.
struct Reader<'a> {
    path: &'a Path,
    file: &'a AdapterFile<'a>,
}

impl Reader<'_> {
    fn plain(&self, name: &str) -> Result<Option<PlainData>> {
        Ok(self.file.tensor(name).map(|view| plain(view.dtype(), view.data())))
    }

    fn f32(&self, name: &str) -> Result<Vec<f32>> {
        let data = self.plain(name)?.ok_or_else(|| Error::format(self.path, format!("{name} is missing")))?;
        if let PlainData::F32(data) = data {
            return Ok(data);
        }
        let mut values = vec![0.0; data.len()];
        data.to_f32(0..data.len(), &mut values);
        Ok(values)
    }
}

fn plain(dtype: Dtype, bytes: &[u8]) -> PlainData {
    let two = |b: &[u8]| [b[0], b[1]];
    match dtype {
        Dtype::F16 => PlainData::F16(bytes.chunks_exact(2).map(|b| f16::from_le_bytes(two(b))).collect()),
        Dtype::BF16 => PlainData::Bf16(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes(two(b))).collect()),
        _ => PlainData::F32(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
    }
}
