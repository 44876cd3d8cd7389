//! Bytes to types and back: no I/O, no cryptography, no policy.
//!
//! Implements the layouts of `docs/FORMAT.md`: [`geometry`] section 2 (sizes and offsets), [`page`] section 3,
//! [`header`] section 4, [`name`] section 7, [`xattr`] section 7.6, [`config`], [`provisioned`] and [`lease`] section 8; [`anatomy`] names their bytes for those who show them. Every parser
//! is strict (what it accepts re-encodes to
//! the same bytes), bounded before it allocates, and never panics.

pub mod anatomy;
pub mod config;
pub mod geometry;
pub mod header;
pub mod hex;
pub mod lease;
pub mod name;
pub mod page;
pub mod provisioned;
pub mod signed;
pub mod xattr;
