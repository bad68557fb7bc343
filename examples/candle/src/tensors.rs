//! candle's tensors as flashtile's: views of the same memory.

use candle_core::{DType, Device, Error, Layout, Result, Storage, StorageRef, Tensor, WithDType, bail};
use flashtile::{AnyTensorMut, AnyTensorRef, Element, TensorMut, TensorRef};
use half::{bf16, f16};

/// A candle tensor whose memory is held for reading. Nothing is copied.
pub struct View<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> View<'a> {
    /// Holds the memory of `tensor`, of any strides.
    pub fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        View { storage, layout }
    }

    /// The size of each axis, if there are `N`.
    pub fn shape<const N: usize>(&self) -> Result<[usize; N]> {
        let dims = self.layout.dims();
        dims.try_into().map_err(|_| Error::Msg(format!("expected a tensor of {N} axes, got {dims:?}")))
    }

    /// The tensor, if its elements are `E` and it has `N` axes.
    pub fn typed<E: Element + WithDType, const N: usize>(&self) -> Result<TensorRef<'_, E, N>> {
        let Storage::Cpu(memory) = &*self.storage else {
            bail!("flashtile computes on the CPU; the tensor is elsewhere")
        };
        let strides: Vec<isize> = self.layout.stride().iter().map(|&stride| stride as isize).collect();
        let strides = strides.try_into().map_err(|_| Error::Msg(format!("expected {N} axes")))?;
        let (offset, shape) = (self.layout.start_offset(), self.shape()?);
        TensorRef::with_strides(memory.as_slice::<E>()?, offset, shape, strides).map_err(Error::wrap)
    }

    /// The tensor, of f32, f16 or bf16 and with 3 or 4 axes.
    pub fn any(&self) -> Result<AnyTensorRef<'_>> {
        let Storage::Cpu(memory) = &*self.storage else {
            bail!("flashtile computes on the CPU; the tensor is elsewhere")
        };
        match candle_core::backend::BackendStorage::dtype(memory) {
            DType::F32 => self.any_of::<f32>(),
            DType::F16 => self.any_of::<f16>(),
            DType::BF16 => self.any_of::<bf16>(),
            other => bail!("flashtile computes with f32, f16 and bf16, not with {other:?}"),
        }
    }

    /// The tensor `[batch, seq, heads, dim]` as flashtile reads it: `[batch, heads, seq, dim]`.
    pub fn heads_first(&self) -> Result<AnyTensorRef<'_>> {
        self.any()?.permuted(&[0, 2, 1, 3]).map_err(Error::wrap)
    }

    fn any_of<E: Element + WithDType>(&self) -> Result<AnyTensorRef<'_>> {
        match self.layout.dims().len() {
            3 => Ok(self.typed::<E, 3>()?.into()),
            4 => Ok(self.typed::<E, 4>()?.into()),
            _ => bail!("expected a tensor of 3 or 4 axes, got {:?}", self.layout.dims()),
        }
    }
}

/// A new contiguous tensor of this shape, of 3 or 4 axes, which `write` fills. Its memory is allocated once.
pub fn new_tensor<E: Element + WithDType>(
    shape: &[usize],
    write: impl FnOnce(AnyTensorMut<'_>) -> std::result::Result<(), flashtile::Error>,
) -> Result<Tensor> {
    let mut memory = vec![E::zero(); shape.iter().product()];
    let out: AnyTensorMut<'_> = match *shape {
        [a, b, c] => TensorMut::from_slice(&mut memory, [a, b, c]).map_err(Error::wrap)?.into(),
        [a, b, c, d] => TensorMut::from_slice(&mut memory, [a, b, c, d]).map_err(Error::wrap)?.into(),
        _ => bail!("expected 3 or 4 axes, got {shape:?}"),
    };
    write(out).map_err(Error::wrap)?;
    Tensor::from_vec(memory, shape, &Device::Cpu)
}
