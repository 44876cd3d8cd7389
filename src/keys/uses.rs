//! What wrapping keys are used for, and on whose behalf: every call of a provider is one [`KeyUse`], handed to whoever keeps
//! the trail.
//!
//! A provider is called on the thread that needs the key, so what is known of the reason travels with the thread: [`Behalf`]
//! says who wants a key and why, [`note_request_id`] what the provider called the request. Neither has an influence on
//! anything but what is recorded.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::crypto::DataKey;

use super::{
    EncryptionContext, KeyDescription, Operation, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};

/// Why a key is wanted, where nobody is waiting for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It will probably be wanted next.
    Prefetch,
    /// It is in use, and its provider is asked again.
    Renewal,
    /// It is made ahead, for files that there will be.
    Pool,
}

impl Reason {
    /// Its name in a trail.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefetch => "prefetch",
            Self::Renewal => "renewal",
            Self::Pool => "pool",
        }
    }
}

/// On whose behalf this thread works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Behalf {
    /// User and thread id of the program that waits, as the kernel says them; a thread id of 0 cannot be seen from here.
    pub caller: Option<(u32, u32)>,
    /// Why, if nobody waits.
    pub reason: Option<Reason>,
    /// The file whose key it is.
    pub file_id: Option<[u8; 32]>,
}

thread_local! {
    static BEHALF: Cell<Behalf> = const { Cell::new(Behalf { caller: None, reason: None, file_id: None }) };
    static REQUEST_ID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes the thread work on its earlier behalf again when dropped.
pub struct OnBehalf(Behalf);

impl Behalf {
    /// That of this thread.
    #[must_use]
    pub fn current() -> Self {
        BEHALF.get()
    }

    /// From now on this thread works for a caller: its user and thread id.
    pub fn set_caller(uid: u32, pid: u32) {
        BEHALF.set(Self { caller: Some((uid, pid)), reason: None, file_id: None });
    }

    /// This thread works on this behalf until what is returned is dropped.
    #[must_use]
    pub fn enter(self) -> OnBehalf {
        OnBehalf(BEHALF.replace(self))
    }

    /// Nobody waits, for this reason.
    #[must_use]
    pub fn ahead(reason: Reason) -> Self {
        Self { caller: None, reason: Some(reason), file_id: None }
    }

    /// The same for the key of a file.
    #[must_use]
    pub fn of_file(self, file_id: [u8; 32]) -> Self {
        Self { file_id: Some(file_id), ..self }
    }
}

impl Drop for OnBehalf {
    fn drop(&mut self) {
        BEHALF.set(self.0);
    }
}

/// A provider says what the other side called the request that this thread has just made. Of several attempts the last counts.
pub(super) fn note_request_id(id: Option<&str>) {
    REQUEST_ID.set(id.map(str::to_owned));
}

/// One call of a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyUse {
    /// When it began.
    pub at: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// What was asked.
    pub operation: Operation,
    /// Whom.
    pub provider: ProviderKind,
    /// The wrapping key as its provider names it; for a new data key that was refused, as the settings do.
    pub wrapping_key: String,
    /// The data key's id as people read it; `None` is the volume's own key, or no key at all.
    pub data_key: Option<String>,
    /// For whom and why.
    pub behalf: Behalf,
    /// What the provider called the request, if it did.
    pub request_id: Option<String>,
    /// What came of it: nothing but whether it went well.
    pub outcome: Result<(), ProviderError>,
}

/// Keeps a trail of the uses of keys.
pub trait KeyUses: Send + Sync {
    /// Whether a key may be used now.
    ///
    /// # Errors
    /// Why not: its use could not be recorded.
    fn check(&self) -> Result<(), ProviderError>;

    /// Takes note of a use. Holds no lock across I/O.
    ///
    /// # Errors
    /// Why the key must not be given out: its use could not be recorded.
    fn note(&self, key_use: KeyUse) -> Result<(), ProviderError>;
}

/// A trail that providers write to.
#[derive(Clone)]
pub struct Trail(pub Arc<dyn KeyUses>);

impl fmt::Debug for Trail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trail")
    }
}

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
        let (at, start) = (SystemTime::now(), Instant::now());
        let answer = call();
        let wrapping_key = answer.as_ref().ok().and_then(used).unwrap_or_else(|| key.to_owned());
        self.trail.0.note(KeyUse {
            at,
            took: start.elapsed(),
            operation,
            provider: self.provider.kind(),
            wrapping_key,
            data_key: context.and_then(EncryptionContext::data_key_id).map(str::to_owned),
            behalf: Behalf::current(),
            request_id: REQUEST_ID.take(),
            outcome: answer.as_ref().map(|_| ()).map_err(Clone::clone),
        })?;
        answer
    }
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

    fn leave_pace_to_caller(&self) {
        self.provider.leave_pace_to_caller();
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let call = || self.provider.generate_data_key(context);
        self.call(Operation::Generate, &self.key, Some(context), call, |(_, wrapped)| Some(wrapped.key_id.clone()))
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

/// What a trail that cannot be written answers.
#[must_use]
pub fn not_recorded(why: &str) -> ProviderError {
    let message = format!("the key is not used, since its use cannot be recorded (--audit-required): {why}");
    ProviderError::new(ProviderErrorKind::Unavailable, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::providers::scripted::{Answer, ScriptedProvider};
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
