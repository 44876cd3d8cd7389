//! Answers that may come from another thread.

use crate::fs::error::Error;

/// Takes the answer of an operation, now or later.
pub type Answer<T> = Box<dyn FnOnce(Result<T, Error>) + Send>;

/// Takes what was read, now or later.
pub type ReadAnswer = Box<dyn FnOnce(Result<&[u8], Error>) + Send>;
