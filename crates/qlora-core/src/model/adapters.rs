//! Several adapters over one base: under names, switched between requests, mixed in one batch.
//!
//! An adapter of any of PEFT's kinds ([`PeftAdapter`]) becomes one row of numbers on the model's device and a table of what they
//! change ([`LoadedAdapter`]). It costs these numbers and the weights that it holds whole, nothing else: the base is never
//! copied or changed, so switching takes no time. Values that are constant once training is over are computed when it
//! is loaded: DoRA's magnitude over the norm of `W + s B A`, a bias together with B's bias.
//!
//! The adapter that is trained ([`CausalLm::add_adapter`]) is not among them, but may be in the same batch.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use qlora_kernels::ops::adapter_rows::{AdapterChanges, AdapterRows, LinearChange, RowAdapter};
use qlora_kernels::ops::linear_group::{AdapterPass, LoraSlot};
use qlora_kernels::tensor::TensorView;
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, View};

use super::adapter_build::build;
use super::causal_lm::CausalLm;
use crate::adapter::PeftAdapter;
use crate::adapter::kinds::{EMBEDDING, HEAD};
use crate::error::{Error, Result};

/// The adapter that computes a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterChoice<'a> {
    /// The one that is switched on: the last that was activated, else the trained one, else none.
    #[default]
    Active,
    /// None.
    Base,
    /// The one that was loaded under this name.
    Named(&'a str),
}

/// The adapters that compute the sequences of one call: one for all, or one for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterChoices<'a> {
    /// The same for every sequence.
    All(AdapterChoice<'a>),
    /// One for each sequence, in their order.
    Each(&'a [AdapterChoice<'a>]),
}

impl Default for AdapterChoices<'_> {
    fn default() -> Self {
        Self::All(AdapterChoice::Active)
    }
}

impl<'a> From<AdapterChoice<'a>> for AdapterChoices<'a> {
    fn from(choice: AdapterChoice<'a>) -> Self {
        Self::All(choice)
    }
}

impl<'a, T: AsRef<[AdapterChoice<'a>]> + ?Sized> From<&'a T> for AdapterChoices<'a> {
    fn from(choices: &'a T) -> Self {
        Self::Each(choices.as_ref())
    }
}

impl<'a> AdapterChoices<'a> {
    /// One choice for each of `sequences`.
    ///
    /// # Errors
    /// If there is another number of choices.
    pub(crate) fn each(self, sequences: usize) -> Result<Cow<'a, [AdapterChoice<'a>]>> {
        match self {
            Self::All(choice) => Ok(Cow::Owned(vec![choice; sequences])),
            Self::Each(choices) if choices.len() == sequences => Ok(Cow::Borrowed(choices)),
            Self::Each(choices) => Err(Error::Invalid(format!(
                "{sequences} sequences need as many choices of an adapter, {} were given",
                choices.len()
            ))),
        }
    }
}

/// The method by which [`CausalLm::add_weighted_adapter`] combines adapters (PEFT's `combination_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Combination {
    /// The weighted sums of the A and of the B, all of one rank, each with the root of weight times scaling: cheap, and a rough
    /// approximation, as the sum of products is not the product of sums.
    Linear,
    /// The ranks one after the other: exactly the weighted sum of the adapters' outputs.
    Cat,
}

/// The adapters that a model has under names.
#[derive(Debug, Default)]
pub(super) struct AdapterSet {
    loaded: BTreeMap<String, LoadedAdapter>,
    active: Option<String>,
}

/// An adapter in memory, for inference.
#[derive(Debug)]
pub struct LoadedAdapter {
    /// All its numbers, one row, f32, on the model's device.
    pub(super) values: Matrix,
    /// Linear layers, the head among them, and norms.
    pub(super) changes: AdapterChanges,
    pub(super) embedding: EmbeddingChange,
    /// Rows of the head in `values`.
    pub(super) head_tokens: HashMap<u32, Range<usize>>,
    /// The weights that it holds whole, each once.
    pub(super) weights: Vec<Arc<dyn FrozenWeight>>,
    pub(super) weight: f32,
    /// The scalings of A and B by module, without `weight`.
    pub(super) scalings: BTreeMap<String, f32>,
}

/// An adapter's change of the embedding; ranges are of its values.
#[derive(Debug, Default)]
pub(super) struct EmbeddingChange {
    pub(super) table: Option<Arc<dyn FrozenWeight>>,
    pub(super) tokens: HashMap<u32, Range<usize>>,
    /// A `[r, vocabulary]`, B `[hidden, r]`.
    pub(super) lora: Option<LoraSlot>,
    pub(super) gain: Option<Range<usize>>,
}

impl LoadedAdapter {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.values.bytes() + self.weights.iter().map(|weight| weight.bytes()).sum::<usize>()
    }

    /// The adapter's weight: a factor of its A and B besides their scaling.
    pub fn weight(&self) -> f32 {
        self.weight
    }

    /// Whether it is nothing but A and B.
    fn is_plain(&self) -> bool {
        let plain = |change: &LinearChange| change.gain.is_none() && change.bias.is_none() && change.weight.is_none();
        self.changes.linears.values().all(plain)
            && self.changes.norms.is_empty()
            && self.embedding.table.is_none()
            && self.embedding.tokens.is_empty()
            && self.embedding.gain.is_none()
            && self.head_tokens.is_empty()
    }

    pub(super) fn changes_head(&self) -> bool {
        self.changes.linears.contains_key(HEAD) || !self.head_tokens.is_empty()
    }
}

/// The adapter chosen for some rows.
#[derive(Clone, Copy)]
pub(super) enum Chosen<'a> {
    Base,
    Trained,
    Loaded(&'a LoadedAdapter),
}

impl Chosen<'_> {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Base, Self::Base) | (Self::Trained, Self::Trained) => true,
            (Self::Loaded(a), Self::Loaded(b)) => std::ptr::eq(*a, *b),
            _ => false,
        }
    }
}

/// Some rows and their adapter.
pub(super) type Span<'a> = (Range<usize>, Chosen<'a>);

impl CausalLm {
    /// Holds an adapter under a name, for inference; one that has the name already is replaced. It runs where it is chosen
    /// ([`AdapterChoice::Named`]) or after [`Self::activate_adapter`].
    ///
    /// # Errors
    /// If it does not fit the model, or the device's memory does not hold it; nothing changes then.
    pub fn load_adapter(&mut self, name: &str, adapter: &PeftAdapter) -> Result<()> {
        check_name(name)?;
        let loaded = build(self, adapter)?;
        self.forget_steps();
        self.adapters.loaded.insert(name.to_owned(), loaded);
        Ok(())
    }

    /// Takes an adapter out of memory. If it was active, the base (or the trained adapter) is.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn unload_adapter(&mut self, name: &str) -> Result<()> {
        self.loaded_adapter(name)?;
        if self.adapters.active.as_deref() == Some(name) {
            self.deactivate_adapter();
        }
        self.forget_steps();
        self.adapters.loaded.remove(name);
        Ok(())
    }

    /// Lets an adapter that was loaded compute everything that does not choose another.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn activate_adapter(&mut self, name: &str) -> Result<()> {
        self.loaded_adapter(name)?;
        self.adapters.active = Some(name.to_owned());
        self.enable_adapter(true);
        Ok(())
    }

    /// Returns to the trained adapter, or the base if there is none, for sequences that choose nothing else.
    pub fn deactivate_adapter(&mut self) {
        self.adapters.active = None;
    }

    /// Switches to the base for sequences that choose nothing else, until [`Self::activate_adapter`] or
    /// [`Self::enable_adapter`].
    pub fn disable_adapters(&mut self) {
        self.enable_adapter(false);
    }

    /// The names of the loaded adapters, sorted.
    pub fn adapter_names(&self) -> impl Iterator<Item = &str> {
        self.adapters.loaded.keys().map(String::as_str)
    }

    /// The active one of the loaded adapters.
    pub fn active_adapter(&self) -> Option<&str> {
        self.adapters.active.as_deref()
    }

    /// The loaded adapter of this name.
    ///
    /// # Errors
    /// If there is none; the message says which there are.
    pub fn loaded_adapter(&self, name: &str) -> Result<&LoadedAdapter> {
        self.adapters.loaded.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.adapter_names().collect();
            let there = if names.is_empty() { "none is loaded".to_owned() } else { format!("loaded are {names:?}") };
            Error::Invalid(format!("there is no adapter {name:?}: {there}"))
        })
    }

    /// Multiplies the adapter's output by `weight` (1 as it is loaded).
    ///
    /// # Errors
    /// If there is none of this name, the weight is not finite, or the adapter does more than add (DoRA, biases, replaced
    /// tensors).
    pub fn set_adapter_weight(&mut self, name: &str, weight: f32) -> Result<()> {
        if !weight.is_finite() {
            return Err(Error::Invalid(format!("the weight of an adapter is {weight}")));
        }
        if !self.loaded_adapter(name)?.is_plain() {
            return Err(not_plain(name, "weighted"));
        }
        self.forget_steps();
        let Some(adapter) = self.adapters.loaded.get_mut(name) else { return Ok(()) };
        for (module, scaling) in &adapter.scalings {
            let slot = match module.as_str() {
                EMBEDDING => adapter.embedding.lora.as_mut(),
                _ => adapter.changes.linears.get_mut(module).and_then(|change| change.lora.as_mut()),
            };
            if let Some(slot) = slot {
                slot.scale = scaling * weight;
            }
        }
        adapter.weight = weight;
        Ok(())
    }

    /// Makes a new adapter, called `name`, of loaded ones, each with a weight (PEFT's `add_weighted_adapter`). Their own weights
    /// count too.
    ///
    /// # Errors
    /// If there is nothing to combine, one is not there or does more than add, or with [`Combination::Linear`] ranks differ.
    pub fn add_weighted_adapter(&mut self, name: &str, parts: &[(&str, f32)], combination: Combination) -> Result<()> {
        check_name(name)?;
        if let Some((part, weight)) = parts.iter().find(|(_, weight)| !weight.is_finite()) {
            return Err(Error::Invalid(format!("the weight of {part:?} is {weight}")));
        }
        let mut sources = Vec::with_capacity(parts.len());
        for (part, weight) in parts {
            let loaded = self.loaded_adapter(part)?;
            if !loaded.is_plain() {
                return Err(not_plain(part, "combined"));
            }
            sources.push((loaded, *weight));
        }
        if sources.is_empty() {
            return Err(Error::Invalid("there is no adapter to combine".into()));
        }
        let combined = super::adapter_build::combine(self, &sources, combination)?;
        self.forget_steps();
        self.adapters.loaded.insert(name.to_owned(), combined);
        Ok(())
    }

    /// Bytes of the loaded adapters.
    pub(super) fn loaded_bytes(&self) -> usize {
        self.adapters.loaded.values().map(LoadedAdapter::bytes).sum()
    }

    /// The adapters of the sequences' rows; neighbours with the same adapter become one span.
    pub(super) fn spans(
        &self,
        rows: impl ExactSizeIterator<Item = Range<usize>>,
        choices: AdapterChoices,
    ) -> Result<Vec<Span<'_>>> {
        let choices = choices.each(rows.len())?;
        let mut spans: Vec<Span> = Vec::new();
        for (rows, choice) in rows.zip(&*choices) {
            let chosen = match choice {
                AdapterChoice::Base => Chosen::Base,
                AdapterChoice::Named(name) => Chosen::Loaded(self.loaded_adapter(name)?),
                AdapterChoice::Active if !self.adapter_enabled() => Chosen::Base,
                AdapterChoice::Active => match &self.adapters.active {
                    Some(name) => Chosen::Loaded(self.loaded_adapter(name)?),
                    None if self.adapter().is_some() => Chosen::Trained,
                    None => Chosen::Base,
                },
            };
            match spans.last_mut().filter(|(last, other)| last.end == rows.start && other.is(&chosen)) {
                Some((last, _)) => last.end = rows.end,
                None => spans.push((rows, chosen)),
            }
        }
        Ok(spans)
    }

    /// Runs `f` with the adapters of these spans.
    pub(super) fn with_pass<R>(&self, spans: &[Span], f: impl FnOnce(Option<AdapterPass>) -> Result<R>) -> Result<R> {
        let runs = spans.iter().any(|(_, chosen)| matches!(chosen, Chosen::Trained));
        let adapter = self.adapter().filter(|_| runs);
        if spans.iter().all(|(_, chosen)| matches!(chosen, Chosen::Base)) {
            return f(None);
        }
        let more = adapter.map(|adapter| adapter.for_inference(self.stack(), self.workspace())).transpose()?.flatten();
        let trained = adapter.map(|adapter| TensorView::new("adapter", adapter.flat.as_tensor())).transpose()?;
        if let (Some(values), None, true) = (&trained, &more, spans.len() == 1) {
            return f(Some(AdapterPass::new(values.view())));
        }
        let trained = more.as_deref().map(Matrix::view).or(trained.as_ref().map(|values| values.view()));
        let rows = self.rows(spans, trained)?;
        f(Some(AdapterPass::by_rows(&rows)))
    }

    /// The adapters of these spans, as the groups take them; `trained`: the values of the one that is trained.
    pub(super) fn rows<'a>(&'a self, spans: &[Span<'a>], trained: Option<View<'a>>) -> Result<AdapterRows<'a>> {
        let part = |(rows, chosen): &Span<'a>| {
            let (values, changes) = match chosen {
                Chosen::Base => return None,
                Chosen::Loaded(adapter) => (adapter.values.view(), &adapter.changes),
                Chosen::Trained => (trained?, self.adapter()?.changes()),
            };
            Some(RowAdapter { rows: rows.clone(), values, changes })
        };
        Ok(AdapterRows::new(spans.iter().filter_map(part).collect())?)
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name == "__base__" {
        return Err(Error::Invalid(format!("{name:?} cannot be the name of an adapter")));
    }
    Ok(())
}

fn not_plain(name: &str, what: &str) -> Error {
    Error::Unsupported(format!(
        "the adapter {name:?} cannot be {what}: it does more than add A and B (DoRA, biases, replaced tensors or tokens)"
    ))
}
