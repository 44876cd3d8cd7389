//! What wrapping keys are used for, and on whose behalf: every call of a provider is one [`KeyUse`], handed to whoever keeps
//! the trail.
//!
//! A provider is called on the thread that needs the key, so what is known of the reason travels with the thread: [`Behalf`]
//! says who wants a key and why, [`note_request_id`] what the provider called the request. Neither has an influence on
//! anything but what is recorded.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::{Operation, ProviderError, ProviderErrorKind, ProviderKind};

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

/// What was noted of the last request.
pub(super) fn take_request_id() -> Option<String> {
    REQUEST_ID.take()
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

/// What a trail that cannot be written answers.
#[must_use]
pub fn not_recorded(why: &str) -> ProviderError {
    let message = format!("the key is not used, since its use cannot be recorded (--audit-required): {why}");
    ProviderError::new(ProviderErrorKind::Unavailable, message)
}
