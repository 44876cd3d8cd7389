//! Calls of providers, counted: which operation, what came of it, and how long it took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::meter::{Histogram, Latency};

use super::{ProviderError, ProviderErrorKind};

/// What a provider can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A new data key.
    Generate,
    /// A new data key that nobody has seen.
    GenerateWrapped,
    /// To unwrap a data key.
    Unwrap,
    /// To wrap a data key.
    Wrap,
    /// To bring a data key from one wrapping key to another.
    Rewrap,
    /// To describe a wrapping key.
    Describe,
}

impl Operation {
    /// All of them, in order.
    pub const ALL: [Self; 6] =
        [Self::Generate, Self::GenerateWrapped, Self::Unwrap, Self::Wrap, Self::Rewrap, Self::Describe];

    /// What AWS KMS calls it, and so its audit trail.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Generate => "GenerateDataKey",
            Self::GenerateWrapped => "GenerateDataKeyWithoutPlaintext",
            Self::Unwrap => "Decrypt",
            Self::Wrap => "Encrypt",
            Self::Rewrap => "ReEncrypt",
            Self::Describe => "DescribeKey",
        }
    }
}

/// What can come of a call: it went well, or one of the kinds of failure.
const RESULTS: usize = ProviderErrorKind::ALL.len() + 1;
const OK: &str = "ok";

/// How many calls were made, and how long they took.
#[derive(Default)]
pub(super) struct CallCounts([Counts; Operation::ALL.len()]);

#[derive(Default)]
struct Counts {
    results: [AtomicU64; RESULTS],
    latency: Histogram,
}

impl CallCounts {
    pub(super) fn count<T>(&self, operation: Operation, answer: &Result<T, ProviderError>, took: Duration) {
        let counts = &self.0[operation as usize];
        let result = answer.as_ref().err().map_or(0, |error| error.kind as usize + 1);
        counts.results[result].fetch_add(1, Ordering::Relaxed);
        counts.latency.note(took);
    }

    pub(super) fn calls(&self) -> CallsByOperation {
        let [generate, generate_wrapped, unwrap, wrap, rewrap, describe] =
            std::array::from_fn(|at| self.0[at].results().iter().sum());
        CallsByOperation { generate, generate_wrapped, unwrap, wrap, rewrap, describe }
    }

    pub(super) fn failures(&self) -> u64 {
        self.0.iter().map(|counts| counts.results()[1..].iter().sum::<u64>()).sum()
    }

    pub(super) fn read(&self) -> Vec<CallMeasure> {
        let names = std::iter::once(OK).chain(ProviderErrorKind::ALL.map(ProviderErrorKind::name));
        let measure = |(operation, counts): (Operation, &Counts)| CallMeasure {
            operation: operation.name().to_owned(),
            results: names.clone().map(str::to_owned).zip(counts.results()).collect(),
            latency: counts.latency.read(),
        };
        Operation::ALL.into_iter().zip(&self.0).map(measure).collect()
    }
}

impl Counts {
    fn results(&self) -> [u64; RESULTS] {
        std::array::from_fn(|at| self.results[at].load(Ordering::Relaxed))
    }
}

/// Calls of one operation of a provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallMeasure {
    /// The operation's name.
    pub operation: String,
    /// How many went how: `ok`, or a kind of failure by its name.
    pub results: Vec<(String, u64)>,
    /// How long they took, without what they waited for their turn.
    pub latency: Latency,
}

/// Calls of each operation of a provider, failed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallsByOperation {
    /// New data keys.
    pub generate: u64,
    /// New data keys that nobody has seen.
    pub generate_wrapped: u64,
    /// Data keys unwrapped.
    pub unwrap: u64,
    /// Data keys wrapped.
    pub wrap: u64,
    /// Data keys brought from one wrapping key to another.
    pub rewrap: u64,
    /// Descriptions of wrapping keys.
    pub describe: u64,
}

impl CallsByOperation {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.generate + self.generate_wrapped + self.unwrap + self.wrap + self.rewrap + self.describe
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_and_results_are_counted_apart() {
        let counts = CallCounts::default();
        for (at, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, at);
        }
        for (at, kind) in ProviderErrorKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
            counts.count::<()>(Operation::Wrap, &Err(ProviderError::new(kind, "")), Duration::ZERO);
        }
        counts.count(Operation::Wrap, &Ok(()), Duration::ZERO);
        counts.count(Operation::Unwrap, &Ok(()), Duration::ZERO);
        let kinds = ProviderErrorKind::ALL.len() as u64;
        assert_eq!((counts.calls().wrap, counts.calls().unwrap, counts.failures()), (kinds + 1, 1, kinds));
        let wrap = &counts.read()[Operation::Wrap as usize];
        assert!(wrap.operation == "Encrypt" && wrap.latency.count() == kinds + 1 && wrap.results.len() == RESULTS);
        assert!(wrap.results.iter().all(|(_, count)| *count == 1));
    }
}
