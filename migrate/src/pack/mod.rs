//! Pages that travel as less than they are: compressed.
//!
//! What is packed is a private copy. Guest memory changes while it is read, and a page that changes goes again; but what a
//! frame says of itself must fit what it carries.

#[cfg(feature = "compress")]
mod built_in;
mod codec;
pub(crate) mod delta;
#[cfg(not(feature = "compress"))]
mod left_out;
mod packer;
mod trials;
mod unpacker;

#[cfg(feature = "compress")]
use built_in::{Compressor, Expander};
pub use codec::Compress;
#[cfg(not(feature = "compress"))]
use left_out::{Compressor, Expander};
pub(crate) use packer::{Form, MOST_PAGES, Packer};
pub(crate) use unpacker::Unpacker;
