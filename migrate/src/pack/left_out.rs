//! The codecs of a build without them.

use super::Compress;
use crate::{Error, Result};

const fn left_out(codec: Compress) -> Error {
    Error::LeftOut {
        codec: codec.name(),
    }
}

/// Never made.
pub(super) enum Compressor {}

impl Compressor {
    pub(super) const fn new(codec: Compress) -> Result<Self> {
        Err(left_out(codec))
    }

    pub(super) const fn codec(&self) -> Compress {
        match *self {}
    }

    pub(super) const fn compress(&mut self, _: &[u8], _: &mut Vec<u8>, _: usize) -> Option<usize> {
        match *self {}
    }
}

/// Expands nothing.
#[derive(Default)]
pub(super) struct Expander;

impl Expander {
    pub(super) const fn prepare(&mut self, codec: Compress) -> Result<()> {
        match codec {
            Compress::None => Ok(()),
            _ => Err(left_out(codec)),
        }
    }

    pub(super) const fn expand(&mut self, codec: Compress, _: &[u8], _: &mut [u8]) -> Result<()> {
        Err(left_out(codec))
    }
}
