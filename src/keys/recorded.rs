//! A provider before which every call is recorded.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::crypto::DataKey;

use super::uses::{note_request_id, take_request_id};
use super::{
    Behalf, EncryptionContext, Generated, KeyDescription, KeyUse, Operation, Provider, ProviderError, ProviderKind,
    Trail, WrappedKey,
};

/// A provider whose every call is recorded, throttled ones included.
pub(super) struct Recorded {
    provider: Arc<dyn Provider>,
    /// The wrapping key that it was opened with.
    key: String,
    trail: Trail,
}

impl Recorded {
    pub(super) fn new(provider: Arc<dyn Provider>, key: &str, trail: Trail) -> Self {
        Self { provider, key: key.to_owned(), trail }
    }

    /// Makes a call and records it; `used` says which wrapping key an answer is from.
    ///
    /// A call's request id is noted on this thread when its answer is there.
    fn call<T>(
        &self,
        operation: Operation,
        key: &str,
        context: Option<&EncryptionContext>,
        call: impl FnOnce() -> Result<T, ProviderError>,
        used: impl FnOnce(&T) -> Option<String>,
    ) -> Result<T, ProviderError> {
        self.trail.0.check()?;
        note_request_id(None);
        let began = Began::now();
        self.record(operation, key, context, began, call(), used)
    }

    /// Records a call that has just been answered.
    fn record<T>(
        &self,
        operation: Operation,
        key: &str,
        context: Option<&EncryptionContext>,
        Began { at, start }: Began,
        answer: Result<T, ProviderError>,
        used: impl FnOnce(&T) -> Option<String>,
    ) -> Result<T, ProviderError> {
        let wrapping_key = answer.as_ref().ok().and_then(used).unwrap_or_else(|| key.to_owned());
        self.trail.0.note(KeyUse {
            at,
            took: start.elapsed(),
            operation,
            provider: self.provider.kind(),
            wrapping_key,
            data_key: context.and_then(EncryptionContext::data_key_id).map(str::to_owned),
            behalf: Behalf::current(),
            request_id: take_request_id(),
            outcome: answer.as_ref().map(|_| ()).map_err(Clone::clone),
        })?;
        answer
    }
}

/// When a call began, by both clocks.
#[derive(Clone, Copy)]
struct Began {
    at: SystemTime,
    start: Instant,
}

impl Began {
    fn now() -> Self {
        Self { at: SystemTime::now(), start: Instant::now() }
    }
}

fn as_generated((_, wrapped): &(DataKey, WrappedKey)) -> Option<String> {
    Some(wrapped.key_id.clone())
}

fn as_asked<T>(_: &T) -> Option<String> {
    None
}

impl Provider for Recorded {
    fn kind(&self) -> ProviderKind {
        self.provider.kind()
    }

    fn is_remote(&self) -> bool {
        self.provider.is_remote()
    }

    fn can_unwrap(&self) -> bool {
        self.provider.can_unwrap()
    }

    fn leave_pace_to_caller(&self) {
        self.provider.leave_pace_to_caller();
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Generated {
        let call = || self.provider.generate_data_key(context);
        self.call(Operation::Generate, &self.key, Some(context), call, as_generated)
    }

    fn makes_many_at_once(&self) -> bool {
        self.provider.makes_many_at_once()
    }

    fn generate_data_keys(&self, contexts: &[EncryptionContext], each: &mut dyn FnMut(usize, Generated)) {
        if let Err(error) = self.trail.0.check() {
            (0..contexts.len()).for_each(|place| each(place, Err(error.clone())));
            return;
        }
        note_request_id(None);
        let began = Began::now();
        self.provider.generate_data_keys(contexts, &mut |place, answer| {
            let context = contexts.get(place);
            each(place, self.record(Operation::Generate, &self.key, context, began, answer, as_generated));
        });
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let call = || self.provider.unwrap(key_id, wrapped, context);
        self.call(Operation::Unwrap, key_id, Some(context), call, as_asked)
    }

    fn hang_up(&self) {
        self.provider.hang_up();
    }

    fn generate_wrapped_key(&self, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let call = || self.provider.generate_wrapped_key(context);
        self.call(Operation::GenerateWrapped, &self.key, Some(context), call, |wrapped| Some(wrapped.key_id.clone()))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let call = || self.provider.wrap(key_id, data_key, context);
        self.call(Operation::Wrap, key_id, Some(context), call, as_asked)
    }

    fn rewrap(
        &self,
        from: &str,
        wrapped: &[u8],
        to: &str,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, ProviderError> {
        let call = || self.provider.rewrap(from, wrapped, to, context);
        self.call(Operation::Rewrap, from, Some(context), call, as_asked)
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        self.call(Operation::Describe, key_id, None, || self.provider.describe(key_id), as_asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::ProviderErrorKind;
    use crate::keys::providers::scripted::{Answer, ScriptedProvider};
    use crate::keys::uses::{KeyUses, not_recorded};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Kept {
        uses: Mutex<Vec<KeyUse>>,
        broken: std::sync::atomic::AtomicBool,
    }

    impl KeyUses for Kept {
        fn check(&self) -> Result<(), ProviderError> {
            Ok(())
        }

        fn note(&self, key_use: KeyUse) -> Result<(), ProviderError> {
            self.uses.lock().unwrap().push(key_use);
            if self.broken.load(std::sync::atomic::Ordering::Relaxed) { Err(not_recorded("test")) } else { Ok(()) }
        }
    }

    #[test]
    fn every_call_is_recorded_with_what_is_known_of_it() {
        let (kept, provider) = (Arc::new(Kept::default()), Arc::new(ScriptedProvider::new("k", true)));
        let recorded = Recorded::new(provider.clone(), "alias", Trail(kept.clone()));
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        Behalf::set_caller(1000, 77);
        let (_, wrapped) = recorded.generate_data_key(&context).unwrap();
        {
            let _file = Behalf::current().of_file([7; 32]).enter();
            provider.then(Answer::Fail(ProviderErrorKind::Denied));
            recorded.unwrap("k", &wrapped.bytes, &context).err().unwrap();
        }
        recorded.unwrap("k", &wrapped.bytes, &context).unwrap();
        let uses = kept.uses.lock().unwrap().clone();
        let brief: Vec<_> = uses
            .iter()
            .map(|key_use| (key_use.operation.name(), key_use.wrapping_key.as_str(), key_use.behalf.file_id))
            .collect();
        assert_eq!(brief, [("GenerateDataKey", "k", None), ("Decrypt", "k", Some([7; 32])), ("Decrypt", "k", None)]);
        assert!(uses.iter().all(|key_use| key_use.behalf.caller == Some((1000, 77))));
        assert!(uses.iter().all(|key_use| key_use.data_key.as_deref() == Some("02020202-0202-0202-0202-020202020202")));
        let kinds: Vec<_> = uses.iter().map(|key_use| key_use.outcome.clone().err().map(|error| error.kind)).collect();
        assert_eq!(kinds, [None, Some(ProviderErrorKind::Denied), None]);
    }

    #[test]
    fn a_key_whose_use_is_not_recorded_is_not_given_out() {
        let (kept, provider) = (Arc::new(Kept::default()), Arc::new(ScriptedProvider::new("k", true)));
        kept.broken.store(true, std::sync::atomic::Ordering::Relaxed);
        let recorded = Recorded::new(provider, "k", Trail(kept));
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        assert_eq!(recorded.generate_data_key(&context).err().unwrap().kind, ProviderErrorKind::Unavailable);
    }
}
