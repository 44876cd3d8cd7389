//! A provider that could not be opened: every call fails as the opening did.

use super::super::{EncryptionContext, KeyDescription, Provider, ProviderError, ProviderKind, WrappedKey};
use crate::crypto::DataKey;

/// See the module.
pub(super) struct AbsentProvider {
    pub(super) kind: ProviderKind,
    pub(super) why: ProviderError,
}

impl Provider for AbsentProvider {
    fn kind(&self) -> ProviderKind {
        self.kind
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn generate_data_key(&self, _: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        Err(self.why.clone())
    }

    fn unwrap(&self, _: &str, _: &[u8], _: &EncryptionContext) -> Result<DataKey, ProviderError> {
        Err(self.why.clone())
    }

    fn wrap(&self, _: &str, _: &DataKey, _: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        Err(self.why.clone())
    }

    fn describe(&self, _: &str) -> Result<KeyDescription, ProviderError> {
        Err(self.why.clone())
    }
}
