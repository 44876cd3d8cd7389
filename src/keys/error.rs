//! Why a key cannot be had.

use crate::crypto::CommitmentMismatch;
use crate::format::config::ConfigError;
use crate::format::header::HeaderError;

use super::{ProviderError, ProviderErrorKind};

/// Why the key of a file or of a volume cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum KeyError {
    /// The provider said no, or nothing.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// Neither header slot parses.
    #[error("the file's header does not parse: {0}")]
    Header(#[from] HeaderError),
    /// Neither header slot has a valid MAC.
    #[error("the file's header does not authenticate: it was changed, or the file belongs to another volume")]
    UnauthenticHeader,
    /// The suite is of a later format, or not one at all.
    #[error("cipher suite {0} is not known to this program")]
    UnknownSuite(String),
    /// No record of the header can be tried.
    #[error("no wrapped key of the file is for a provider and a wrapping key of this volume (it names {0})")]
    NoUsableRecord(String),
    /// The unwrapped key is another one.
    #[error(transparent)]
    Commitment(#[from] CommitmentMismatch),
    /// All keys were dropped, and none may be had until `kmsfs unlock`.
    #[error("the mount is locked: unlock it with `kmsfs unlock`")]
    Locked,
    /// The volume config does not parse.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The volume config's seal is broken.
    #[error(
        "the volume config does not authenticate: it was changed after it was sealed; restore volume.toml.1 or a backup"
    )]
    BrokenSeal,
    /// The volume config has no record for the provider.
    #[error("the volume key is not wrapped for the provider {0}")]
    NoVolumeRecord(String),
}

impl KeyError {
    /// Whether the provider merely could not be reached: it has not refused the key.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self.provider_kind(), Some(ProviderErrorKind::Unavailable | ProviderErrorKind::Throttled))
    }

    /// What the provider called the request that failed.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Provider(error) => error.request_id.as_deref(),
            _ => None,
        }
    }

    /// What kind of provider failure it is, if it is one.
    #[must_use]
    pub fn provider_kind(&self) -> Option<ProviderErrorKind> {
        match self {
            Self::Provider(error) => Some(error.kind),
            _ => None,
        }
    }
}
