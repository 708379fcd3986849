//! A graph of backend operations under construction: tensors, and the operations that join them.

use super::api::{Api, DataType, Kind, Pointwise, RawDescriptor, Reduce, attribute as at, kind_of_value as kv};
use super::descriptor::Descriptor;
use super::error::Result;

/// Every tensor of this module has four dimensions.
pub(super) type Dims = [i64; 4];

/// Byte alignment that is promised for tensors in device memory.
pub(super) const ALIGNMENT: i64 = 16;

/// A tensor of a graph, by its position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tensor(usize);

impl Tensor {
    /// The number by which cuDNN knows the tensor.
    pub(super) fn uid(self) -> i64 {
        self.0 as i64 + 1
    }
}

/// The place of a tensor in an operation graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Between two operations only; never in memory.
    Virtual,
    /// In device memory; its address is bound at execution.
    Device,
    /// One value, read from host memory at execution.
    Value,
}

/// Strides of a dense tensor with these dimensions.
pub(super) fn packed(dims: Dims) -> Dims {
    [dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1]
}

/// Swaps the last two dimensions (or strides).
pub(super) fn transposed([a, b, c, d]: Dims) -> Dims {
    [a, b, d, c]
}

/// Actual lengths that replace the rows, columns and inner dimension of a matrix product, sequence by sequence.
#[derive(Clone, Copy, Default)]
pub(super) struct Overrides {
    pub(super) m: Option<Tensor>,
    pub(super) n: Option<Tensor>,
    pub(super) k: Option<Tensor>,
}

/// The descriptors of a graph. All of them stay alive as long as the plan made from them.
pub(super) struct Graph {
    api: &'static Api,
    tensors: Vec<Descriptor>,
    shapes: Vec<Dims>,
    attributes: Vec<Descriptor>,
    operations: Vec<Descriptor>,
}

impl Graph {
    /// An empty graph.
    pub(super) fn new(api: &'static Api) -> Self {
        Self { api, tensors: Vec::new(), shapes: Vec::new(), attributes: Vec::new(), operations: Vec::new() }
    }

    /// Adds a tensor. With `ragged`, sequence `b` starts at the offset (in elements) that this tensor holds for `b`,
    /// and the stride of the first dimension is not used.
    pub(super) fn tensor(
        &mut self,
        place: Place,
        data_type: DataType,
        dims: Dims,
        strides: Dims,
        ragged: Option<Tensor>,
    ) -> Result<Tensor> {
        let id = Tensor(self.tensors.len());
        let mut tensor = Descriptor::new(self.api, Kind::Tensor)?;
        tensor.set_enum(at::TENSOR_DATA_TYPE, kv::DATA_TYPE, data_type as i32)?;
        tensor.set_i64(at::TENSOR_DIMENSIONS, &dims)?;
        tensor.set_i64(at::TENSOR_STRIDES, &strides)?;
        tensor.set_i64(at::TENSOR_UNIQUE_ID, &[id.uid()])?;
        tensor.set_i64(at::TENSOR_BYTE_ALIGNMENT, &[ALIGNMENT])?;
        tensor.set_bool(at::TENSOR_IS_VIRTUAL, place == Place::Virtual)?;
        tensor.set_bool(at::TENSOR_IS_BY_VALUE, place == Place::Value)?;
        if let Some(offsets) = ragged {
            tensor.set_descriptors(at::TENSOR_RAGGED_OFFSET_DESC, &[self.tensors[offsets.0].raw()])?;
        }
        tensor.finalize()?;
        self.tensors.push(tensor);
        self.shapes.push(dims);
        Ok(id)
    }

    /// A dense tensor between two operations.
    pub(super) fn between(&mut self, data_type: DataType, dims: Dims) -> Result<Tensor> {
        self.tensor(Place::Virtual, data_type, dims, packed(dims), None)
    }

    /// One f32 from host memory.
    pub(super) fn value(&mut self) -> Result<Tensor> {
        self.tensor(Place::Value, DataType::Float, [1; 4], [1; 4], None)
    }

    /// `y = mode(x)`, `mode(x, b)` or `mode(x, b, t)`, computed in `compute`; `axis` belongs to `GenIndex`.
    pub(super) fn pointwise_into(
        &mut self,
        mode: Pointwise,
        compute: DataType,
        inputs: &[Tensor],
        y: Tensor,
        axis: Option<i64>,
    ) -> Result<()> {
        let mut settings = Descriptor::new(self.api, Kind::Pointwise)?;
        settings.set_enum(at::POINTWISE_MODE, kv::POINTWISE_MODE, mode as i32)?;
        settings.set_enum(at::POINTWISE_MATH_PREC, kv::DATA_TYPE, compute as i32)?;
        if let Some(axis) = axis {
            settings.set_i64(at::POINTWISE_AXIS, &[axis])?;
        }
        settings.finalize()?;

        let names = [at::OPERATION_POINTWISE_XDESC, at::OPERATION_POINTWISE_BDESC, at::OPERATION_POINTWISE_TDESC];
        let mut parts = vec![(at::OPERATION_POINTWISE_PW_DESCRIPTOR, settings.raw())];
        parts.extend(names.into_iter().zip(inputs.iter().map(|input| self.raw(*input))));
        parts.push((at::OPERATION_POINTWISE_YDESC, self.raw(y)));
        self.operation(Kind::OperationPointwise, &parts)?;
        self.attributes.push(settings);
        Ok(())
    }

    /// [`Graph::pointwise_into`] in f32 into a new f32 tensor of the first input's shape.
    pub(super) fn pointwise(&mut self, mode: Pointwise, inputs: &[Tensor]) -> Result<Tensor> {
        let y = self.between(DataType::Float, self.shapes[inputs[0].0])?;
        self.pointwise_into(mode, DataType::Float, inputs, y, None)?;
        Ok(y)
    }

    /// The index along `axis` at every place of a tensor shaped as `like`.
    pub(super) fn index(&mut self, like: Tensor, axis: i64) -> Result<Tensor> {
        let y = self.between(DataType::Int32, self.shapes[like.0])?;
        self.pointwise_into(Pointwise::GenIndex, DataType::Int32, &[like], y, Some(axis))?;
        Ok(y)
    }

    /// A comparison or a logical operation, computed in booleans.
    pub(super) fn logical(&mut self, mode: Pointwise, a: Tensor, b: Tensor) -> Result<Tensor> {
        let y = self.between(DataType::Boolean, self.shapes[a.0])?;
        self.pointwise_into(mode, DataType::Boolean, &[a, b], y, None)?;
        Ok(y)
    }

    /// `c = a b` over the last two dimensions, accumulated in f32.
    pub(super) fn matmul_into(&mut self, a: Tensor, b: Tensor, c: Tensor, lengths: Overrides) -> Result<()> {
        let mut settings = Descriptor::new(self.api, Kind::Matmul)?;
        settings.set_enum(at::MATMUL_COMP_TYPE, kv::DATA_TYPE, DataType::Float as i32)?;
        settings.finalize()?;
        let mut parts = vec![
            (at::OPERATION_MATMUL_ADESC, self.raw(a)),
            (at::OPERATION_MATMUL_BDESC, self.raw(b)),
            (at::OPERATION_MATMUL_CDESC, self.raw(c)),
            (at::OPERATION_MATMUL_DESC, settings.raw()),
        ];
        let names = [
            at::OPERATION_MATMUL_M_OVERRIDE_DESC,
            at::OPERATION_MATMUL_N_OVERRIDE_DESC,
            at::OPERATION_MATMUL_K_OVERRIDE_DESC,
        ];
        for (name, length) in names.into_iter().zip([lengths.m, lengths.n, lengths.k]) {
            parts.extend(length.map(|length| (name, self.raw(length))));
        }
        self.operation(Kind::OperationMatmul, &parts)?;
        self.attributes.push(settings);
        Ok(())
    }

    /// `y = reduction of x` over the dimensions in which `y` is smaller, in f32.
    pub(super) fn reduce_into(&mut self, mode: Reduce, x: Tensor, y: Tensor) -> Result<()> {
        let mut settings = Descriptor::new(self.api, Kind::Reduction)?;
        settings.set_enum(at::REDUCTION_COMP_TYPE, kv::DATA_TYPE, DataType::Float as i32)?;
        settings.set_enum(at::REDUCTION_OPERATOR, kv::REDUCTION_OPERATOR, mode as i32)?;
        settings.finalize()?;
        let parts = [
            (at::OPERATION_REDUCTION_DESC, settings.raw()),
            (at::OPERATION_REDUCTION_XDESC, self.raw(x)),
            (at::OPERATION_REDUCTION_YDESC, self.raw(y)),
        ];
        self.operation(Kind::OperationReduction, &parts)?;
        self.attributes.push(settings);
        Ok(())
    }

    /// `y` is `x` seen with other dimensions.
    pub(super) fn reshape_into(&mut self, x: Tensor, y: Tensor) -> Result<()> {
        let parts = [(at::OPERATION_RESHAPE_XDESC, self.raw(x)), (at::OPERATION_RESHAPE_YDESC, self.raw(y))];
        self.operation(Kind::OperationReshape, &parts)
    }

    /// The operations, in the order in which they were added.
    pub(super) fn operations(&self) -> Vec<RawDescriptor> {
        self.operations.iter().map(Descriptor::raw).collect()
    }

    fn operation(&mut self, kind: Kind, parts: &[(i32, RawDescriptor)]) -> Result<()> {
        let mut operation = Descriptor::new(self.api, kind)?;
        for (name, descriptor) in parts {
            operation.set_descriptors(*name, &[*descriptor])?;
        }
        operation.finalize()?;
        self.operations.push(operation);
        Ok(())
    }

    fn raw(&self, tensor: Tensor) -> RawDescriptor {
        self.tensors[tensor.0].raw()
    }
}
