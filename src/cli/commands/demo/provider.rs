//! The demonstration's view of a provider: every call passes through and is written down, and the key can be switched off as
//! its owner would. Nothing is changed at the provider itself: the key may be one that others use.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::crypto::DataKey;
use crate::keys::{EncryptionContext, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey};

/// A call that was made.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// As AWS KMS calls it.
    pub(super) operation: &'static str,
    /// What the key was bound to.
    pub(super) context: Vec<(String, String)>,
    /// The wrapped key that was made, if one was.
    pub(super) wrapped: Option<WrappedKey>,
}

/// A provider that is watched.
pub(super) struct Watched {
    inner: Arc<dyn Provider>,
    disabled: AtomicBool,
    calls: Mutex<Vec<Call>>,
}

impl Watched {
    pub(super) fn new(inner: Arc<dyn Provider>) -> Self {
        Self { inner, disabled: AtomicBool::new(false), calls: Mutex::default() }
    }

    /// From now on the key is as good as disabled, or enabled again.
    pub(super) fn disable(&self, disabled: bool) {
        self.disabled.store(disabled, Ordering::SeqCst);
    }

    /// The calls so far.
    pub(super) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, operation: &'static str, context: &EncryptionContext, wrapped: Option<&WrappedKey>) {
        let context = context.pairs().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let call = Call { operation, context, wrapped: wrapped.cloned() };
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }

    /// Refuses as a KMS does whose key is disabled. That is a call too.
    fn check(&self, operation: &'static str, context: &EncryptionContext) -> Result<(), ProviderError> {
        if !self.disabled.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.note(operation, context, None);
        Err(ProviderError::new(ProviderErrorKind::KeyUnusable, "the demonstration has disabled the key"))
    }
}

impl Provider for Watched {
    fn kind(&self) -> ProviderKind {
        self.inner.kind()
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }

    fn leave_pace_to_caller(&self) {
        self.inner.leave_pace_to_caller();
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        const OPERATION: &str = "GenerateDataKey";
        self.check(OPERATION, context)?;
        let made = self.inner.generate_data_key(context);
        self.note(OPERATION, context, made.as_ref().ok().map(|(_, wrapped)| wrapped));
        made
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        const OPERATION: &str = "Decrypt";
        self.check(OPERATION, context)?;
        self.note(OPERATION, context, None);
        self.inner.unwrap(key_id, wrapped, context)
    }

    fn hang_up(&self) {
        self.inner.hang_up();
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        const OPERATION: &str = "Encrypt";
        self.check(OPERATION, context)?;
        let wrapped = self.inner.wrap(key_id, data_key, context);
        self.note(OPERATION, context, wrapped.as_ref().ok());
        wrapped
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::providers::scripted::ScriptedProvider;

    #[test]
    fn calls_are_written_down_and_a_disabled_key_refuses() {
        let watched = Watched::new(Arc::new(ScriptedProvider::new("key", false)));
        let context = EncryptionContext::volume_key(&[1; 16]);
        let (_, wrapped) = watched.generate_data_key(&context).unwrap();
        watched.disable(true);
        let refused = watched.unwrap("key", &wrapped.bytes, &context).err().unwrap();
        assert_eq!(refused.kind, ProviderErrorKind::KeyUnusable);
        watched.disable(false);
        watched.unwrap("key", &wrapped.bytes, &context).unwrap();
        let operations: Vec<_> = watched.calls().iter().map(|call| call.operation).collect();
        assert_eq!(operations, ["GenerateDataKey", "Decrypt", "Decrypt"]);
        assert_eq!(watched.calls()[0].wrapped.as_ref(), Some(&wrapped));
    }
}
