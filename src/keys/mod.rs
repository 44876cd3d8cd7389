//! Wrapping keys: providers, and the path from a header's bytes to the keys of a file.
//!
//! ```text
//! header bytes -> format/header -> ring -> cache -> flight -> provider
//! ```
//! Opens no user files. Invariants:
//! * a provider is asked only for headers whose MAC was checked and whose wrapping key is on the volume's list;
//! * no lock is held across a provider's call;
//! * an unwrapped key is believed only if it matches the header's commitment.

mod authentic;
mod cache;
mod calls;
mod context;
mod demand;
mod describe;
mod error;
mod flight;
mod gate;
mod key_list;
mod key_measures;
mod metered;
mod moment;
mod pool;
mod provider;
pub mod providers;
mod provisioned;
mod recipients;
mod recorded;
mod refusals;
mod rewrap;
mod ring;
#[cfg(test)]
mod tests;
mod uses;
pub mod volume;

pub use authentic::AuthenticHeader;
pub use cache::KeyLimits;
pub use calls::{CallMeasure, CallsByOperation, Operation};
pub use context::EncryptionContext;
pub use describe::{KeyDescription, KeyState};
pub use error::KeyError;
pub use gate::Pass;
pub use key_measures::{KeyMeasures, KeyStats};
pub use moment::Moment;
pub use pool::PoolMeasure;
pub use provider::{Generated, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey};
pub use provisioned::{ProvisionedKeys, ProvisionedUse};
pub use recipients::Recipient;
pub use rewrap::{Missing, Wanted};
pub use ring::{OpenedKeys, Ring};
pub use uses::{Behalf, KeyUse, KeyUses, OnBehalf, Reason, Trail, not_recorded};
pub use volume::Volume;
