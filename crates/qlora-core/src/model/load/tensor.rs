//! One tensor of a checkpoint onto its device.

use std::sync::Arc;

#[cfg(feature = "cuda")]
use qlora_kernels::cuda::{CudaWeight, Source, Uploader};
use qlora_kernels::quant::{Quantized4bit, QuantizedInt};
use qlora_kernels::weight::{FrozenWeight, Int8Activations, PlainData, PlainWeight};
use qlora_kernels::{Matrix, Workspace};

use super::super::assemble::ModelPart;
use super::Quantization;
use super::placer::Placer;
use crate::config::StoredQuantization;
use crate::error::{Error, Result};
use crate::source::{PlainTensor, SourceWeight, StoredTensor, WeightSource};

/// The destination of a loaded tensor: its form in the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    /// One f32 row: a norm, a bias.
    Vector,
    /// A table that is not quantized while loading; a head may be stored quantized.
    Table,
    /// A table that stays in host memory.
    HostTable,
    /// The weight of a projection.
    Projection,
}

/// A tensor to be loaded.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) place: Place,
}

/// The state that all threads that load a model share.
pub(super) struct Context<'a> {
    pub(super) source: &'a dyn WeightSource,
    pub(super) quantization: Quantization,
    pub(super) workspace: &'a Workspace,
    /// Of a base that is not whole on the device.
    pub(super) placer: Option<&'a Placer>,
}

/// The state of a single loading thread.
#[derive(Default)]
pub(super) struct Tools {
    #[cfg(feature = "cuda")]
    pub(super) uploader: Option<Uploader>,
}

impl Tools {
    /// # Errors
    /// If there is no memory for a GPU's uploader.
    pub(super) fn new(context: &Context, jobs: &[Job]) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = context.workspace.gpu() {
            let largest = jobs.iter().map(|job| 4 * job.shape.iter().product::<usize>()).max().unwrap_or(0);
            return Ok(Self { uploader: Some(Uploader::new(gpu, largest)?) });
        }
        let _ = (context, jobs);
        Ok(Self::default())
    }
}

impl Context<'_> {
    /// Host memory that loading a tensor takes, where it is not read piece by piece.
    pub(super) fn host_bytes(&self, job: &Job) -> u64 {
        match self.stored(job) {
            Some(_) => 0,
            // In the file's form: its arrays, and what is made of them.
            None if matches!(self.source.quantization(), Some(StoredQuantization::Bnb4bit)) => {
                2 * self.source.stored_bytes(&job.name)
            }
            None => 4 * job.shape.iter().product::<usize>() as u64,
        }
    }

    /// Loads a tensor; none if it has gone to its place already.
    ///
    /// # Errors
    /// If the tensor cannot be read, has another shape than the configuration gives, or holds values that it cannot; the
    /// message names it.
    pub(super) fn load(&self, job: &Job, tools: &mut Tools) -> Result<Option<ModelPart>> {
        let part = self.part(job, tools)?;
        match self.placer {
            Some(placer) => placer.place(job, part),
            None => Ok(Some(part)),
        }
    }

    fn part(&self, job: &Job, tools: &mut Tools) -> Result<ModelPart> {
        match (job.place, self.stored(job)) {
            (Place::Vector, _) => self.vector(job).map(ModelPart::Vector),
            (Place::HostTable, _) => {
                let tensor = self.source.read(&job.name)?;
                self.check_shape(job, &tensor.shape)?;
                check_finite(&job.name, &tensor.data)?;
                Ok(ModelPart::Weight(Arc::new(tensor.into_weight(&job.name)?)))
            }
            #[cfg(feature = "cuda")]
            (_, Some(stored)) => self.upload(job, stored, tools).map(ModelPart::Weight),
            _ => {
                let weight = self.source.read_weight(&job.name)?;
                self.check_shape(job, &weight.shape())?;
                self.weight(job, weight, tools).map(ModelPart::Weight)
            }
        }
    }

    /// The tensor in its file, if it goes from there to a GPU.
    fn stored(&self, job: &Job) -> Option<StoredTensor<'_>> {
        let plain = matches!(self.quantization, Quantization::None | Quantization::Bits4(_));
        let streamed = match job.place {
            Place::Table => true,
            Place::Projection => plain,
            Place::Vector | Place::HostTable => false,
        };
        let to_gpu = streamed && !self.workspace.device().is_cpu();
        if to_gpu { self.source.stored(&job.name) } else { None }
    }

    #[cfg(feature = "cuda")]
    fn upload(&self, job: &Job, stored: StoredTensor, tools: &mut Tools) -> Result<Arc<dyn FrozenWeight>> {
        let uploader = uploader(tools)?;
        let &[rows, cols] = &*job.shape else {
            return Err(Error::tensor(&job.name, format!("has shape {:?}, a weight has two sizes", job.shape)));
        };
        self.check_shape(job, &self.source.shape(&job.name).unwrap_or_default())?;
        let (source, shape) = (Source::File(stored.bytes), [rows, cols]);
        let weight = match (job.place, self.quantization) {
            (Place::Projection, Quantization::Bits4(config)) => {
                CudaWeight::quantize_from(source, stored.dtype, shape, &config, uploader)
            }
            _ => CudaWeight::plain_from(source, stored.dtype, shape, self.workspace.dtype(), uploader),
        };
        match weight {
            Ok(weight) => Ok(Arc::new(weight)),
            Err(error) => {
                // Where the file holds a value that cannot be used, this says which one.
                if let qlora_kernels::Error::Invalid { .. } = error {
                    self.source.read_finite(&job.name)?;
                }
                let place = self.source.file_of(&job.name).unwrap_or(self.source.path()).display();
                Err(match error {
                    qlora_kernels::Error::OutOfMemory { .. } | qlora_kernels::Error::Cuda { .. } => error.into(),
                    other => Error::tensor(&job.name, format!("{other}, in {place}")),
                })
            }
        }
    }

    fn weight(&self, job: &Job, weight: SourceWeight, tools: &mut Tools) -> Result<Arc<dyn FrozenWeight>> {
        let quantization = if job.place == Place::Projection { self.quantization } else { Quantization::None };
        match (weight, quantization) {
            (SourceWeight::Plain(PlainTensor { data, shape }), quantization) if quantization != Quantization::None => {
                let (rows, cols) = (shape[0], shape[1]);
                self.quantize(&data, rows, cols, quantization, tools)
                    .map_err(|error| Error::tensor(&job.name, error.to_string()))
            }
            (SourceWeight::Plain(tensor), _) => {
                check_finite(&job.name, &tensor.data)?;
                self.plain(tensor.into_weight(&job.name)?)
            }
            // A weight that is stored quantized stays so: `check_quantization` saw to it that nothing else was asked
            // for.
            #[cfg(feature = "cuda")]
            (SourceWeight::FourBit(weight), _) if self.workspace.gpu().is_some() => {
                Ok(Arc::new(CudaWeight::quantized_from(&weight, uploader(tools)?)?))
            }
            (SourceWeight::FourBit(weight), _) => Ok(Arc::new(weight)),
            (SourceWeight::Int(weight), _) => self.integers(weight),
        }
    }

    /// Quantizes on the device that the weight is for.
    fn quantize(
        &self,
        data: &PlainData,
        rows: usize,
        cols: usize,
        quantization: Quantization,
        tools: &mut Tools,
    ) -> Result<Arc<dyn FrozenWeight>> {
        let _ = &tools;
        match quantization {
            Quantization::None => self.plain(PlainWeight::new(data.clone(), rows, cols)),
            #[cfg(feature = "cuda")]
            Quantization::Bits4(config) if self.workspace.gpu().is_some() => {
                Ok(Arc::new(CudaWeight::quantize_with(data, rows, cols, &config, uploader(tools)?)?))
            }
            Quantization::Bits4(config) => Ok(Arc::new(Quantized4bit::quantize(data, rows, cols, &config)?)),
            Quantization::Int8 => {
                self.integers(QuantizedInt::llm_int8(data, rows, cols, Int8Activations::THRESHOLD, &[])?)
            }
            Quantization::Int(config) => self.integers(QuantizedInt::quantize(data, rows, cols, &config)?),
        }
    }

    fn integers(&self, weight: QuantizedInt) -> Result<Arc<dyn FrozenWeight>> {
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::integers(&weight, self.workspace)?));
        }
        Ok(Arc::new(weight))
    }

    fn plain(&self, weight: PlainWeight) -> Result<Arc<dyn FrozenWeight>> {
        #[cfg(feature = "cuda")]
        if self.workspace.gpu().is_some() {
            return Ok(Arc::new(CudaWeight::plain(&weight, self.workspace)?));
        }
        Ok(Arc::new(weight))
    }

    fn vector(&self, job: &Job) -> Result<Matrix> {
        let tensor = self.source.read(&job.name)?;
        self.check_shape(job, &tensor.shape)?;
        check_finite(&job.name, &tensor.data)?;
        let mut values = vec![0.0; tensor.data.len()];
        tensor.data.to_f32(0..values.len(), &mut values);
        Ok(self.workspace.upload(&values, 1, values.len())?)
    }

    fn check_shape(&self, job: &Job, got: &[usize]) -> Result<()> {
        if got == job.shape {
            return Ok(());
        }
        let message = format!("has shape {got:?}, the configuration asks for {:?}", job.shape);
        Err(Error::tensor(&job.name, message))
    }
}

#[cfg(feature = "cuda")]
fn uploader(tools: &mut Tools) -> Result<&mut Uploader> {
    tools.uploader.as_mut().ok_or_else(|| Error::Invalid("a GPU's weight is loaded without an uploader".into()))
}

fn check_finite(name: &str, data: &PlainData) -> Result<()> {
    match data.first_non_finite() {
        None => Ok(()),
        Some(index) => Err(Error::tensor(name, format!("element {index} is not finite (NaN or infinity)"))),
    }
}
