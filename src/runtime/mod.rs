//! Threads: the only room that decides when one starts, how long it waits, and how it ends.
//!
//! Invariants: every wait for a thread has a deadline; no thread waits for itself; a job that panics takes no other along.

mod listener;
mod periodic;
mod thread;
mod work_queue;
mod worker_pool;

pub(crate) use listener::{Connection, ConnectionLimits, Listener};
pub(crate) use periodic::{Next, Periodic};
pub(crate) use work_queue::WorkQueue;
pub(crate) use worker_pool::{Late, Limits, WorkerPool};
