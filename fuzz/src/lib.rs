//! What the fuzz targets do with their bytes: one function for each, which panics if a promise of `docs/FORMAT.md` is broken.
//!
//! MACs and tags stop a fuzzer. So most of these have a way behind them: what parses is sealed with a known key, and is then a
//! thing that a holder of the key could have made.

mod content;
mod input;
mod volume;

pub mod config;
pub mod damage;
pub mod geometry;
pub mod header;
pub mod image;
pub mod names;
pub mod provisioned;
pub mod records;
pub mod targets;
pub mod xattrs;

/// What takes a fuzzer's bytes.
pub type Body = fn(&[u8]);

/// Every target by its name.
pub const ALL: [(&str, Body); 10] = [
    ("config", config::run),
    ("damage", damage::run),
    ("geometry", geometry::run),
    ("header", header::run),
    ("image", image::run),
    ("names", names::run),
    ("provisioned", provisioned::run),
    ("records", records::run),
    ("targets", targets::run),
    ("xattrs", xattrs::run),
];
