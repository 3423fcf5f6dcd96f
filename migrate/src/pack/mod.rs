//! Pages that travel as less than they are: as what has changed of them, or compressed, or both.
//!
//! What is packed is a private copy. Guest memory changes while it is read, and a page that changes goes again; but what a
//! frame says of itself must fit what it carries.

mod bases;
#[cfg(feature = "compress")]
mod built_in;
mod codec;
pub(crate) mod delta;
#[cfg(all(test, feature = "compress"))]
mod interleavings;
#[cfg(not(feature = "compress"))]
mod left_out;
mod packer;
mod trials;
mod unpacker;

pub(crate) use bases::{Applied, Bases};
#[cfg(feature = "compress")]
use built_in::{Compressor, Expander};
pub use codec::Compress;
#[cfg(not(feature = "compress"))]
use left_out::{Compressor, Expander};
pub(crate) use packer::{Form, MOST_PAGES, Packer};
pub(crate) use unpacker::Unpacker;
