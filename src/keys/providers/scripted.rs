//! A provider that does as it is told, for tests of this crate and of programs that embed it: it counts its calls, and
//! can fail, lie, or keep its callers waiting. Its keys live and die with it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::super::{
    EncryptionContext, KeyDescription, KeyState, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::local::VersionKey;
use crate::crypto::{DataKey, Secret};

/// What a call answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// What it should.
    #[default]
    Right,
    /// A failure of this kind.
    Fail(ProviderErrorKind),
    /// Success, with a data key that is not the wrapped one.
    WrongKey,
}

/// How many calls have begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Of [`Provider::generate_data_key`].
    pub generate: u64,
    /// Of [`Provider::generate_wrapped_key`].
    pub generate_wrapped: u64,
    /// Of [`Provider::unwrap`].
    pub unwrap: u64,
    /// Of [`Provider::wrap`].
    pub wrap: u64,
    /// Of [`Provider::rewrap`].
    pub rewrap: u64,
}

/// A provider whose answers are scripted.
pub struct ScriptedProvider {
    key_id: String,
    key: VersionKey,
    remote: bool,
    script: Mutex<Script>,
    changed: Condvar,
}

#[derive(Default)]
struct Script {
    next: VecDeque<Answer>,
    otherwise: Answer,
    calls: Calls,
    held: bool,
    only_wraps: bool,
    many_at_once: bool,
    makes_none: bool,
    waiting: usize,
}

impl ScriptedProvider {
    /// A provider with one random key named `key_id`, whose calls count as crossing a network if `remote`. It answers
    /// rightly until told otherwise.
    #[must_use]
    pub fn new(key_id: &str, remote: bool) -> Self {
        Self {
            key_id: key_id.to_owned(),
            key: VersionKey::new(1, &Secret::random()),
            remote,
            script: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Appends to the answers of the next calls, one each.
    pub fn then(&self, answer: Answer) {
        self.script().next.push_back(answer);
    }

    /// Sets the answer of every call that has none of its own.
    pub fn always(&self, answer: Answer) {
        self.script().otherwise = answer;
    }

    /// From now on it is one that only wraps.
    pub fn only_wrap(&self) {
        self.script().only_wraps = true;
    }

    /// From now on it makes many data keys at once.
    pub fn make_many_at_once(&self) {
        self.script().many_at_once = true;
    }

    /// From now on it refuses to make data keys, and unwraps those that there are.
    pub fn make_none(&self) {
        self.script().makes_none = true;
    }

    /// Makes every call that begins from now on wait for [`Self::release`].
    pub fn hold(&self) {
        self.script().held = true;
    }

    /// Lets all calls go on.
    pub fn release(&self) {
        self.script().held = false;
        self.changed.notify_all();
    }

    /// Returns when at least `count` calls wait for [`Self::release`].
    pub fn until_waiting(&self, count: usize) {
        let script = self.script();
        drop(self.changed.wait_while(script, |script| script.waiting < count));
    }

    /// How many calls have begun.
    #[must_use]
    pub fn calls(&self) -> Calls {
        self.script().calls
    }

    /// `data_key` as this provider wraps it; not a call.
    #[must_use]
    pub fn wrap_here(&self, data_key: &DataKey, context: &EncryptionContext) -> WrappedKey {
        WrappedKey { key_id: self.key_id.clone(), bytes: self.key.wrap(&self.key_id, data_key, context) }
    }

    /// Counts a call, takes its answer, and waits if told to.
    fn begin(&self, count: impl FnOnce(&mut Calls)) -> Result<Answer, ProviderError> {
        let mut script = self.script();
        count(&mut script.calls);
        let answer = script.next.pop_front().unwrap_or(script.otherwise);
        script.waiting += 1;
        self.changed.notify_all();
        let held = self.changed.wait_while(script, |script| script.held);
        held.unwrap_or_else(PoisonError::into_inner).waiting -= 1;
        match answer {
            Answer::Fail(kind) => Err(ProviderError::new(kind, format!("scripted failure: {kind:?}"))),
            answer => Ok(answer),
        }
    }

    fn check_name(&self, key_id: &str) -> Result<(), ProviderError> {
        if key_id == self.key_id {
            return Ok(());
        }
        Err(ProviderError::new(ProviderErrorKind::KeyNotFound, format!("there is no key {key_id}")))
    }

    fn unwrap_here(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        self.check_name(key_id)?;
        let data_key = self.key.unwrap(key_id, wrapped, context);
        data_key.ok_or_else(|| ProviderError::new(ProviderErrorKind::Tampered, "does not unwrap"))
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Provider for ScriptedProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Local
    }

    fn is_remote(&self) -> bool {
        self.remote
    }

    fn can_unwrap(&self) -> bool {
        !self.script().only_wraps
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let answer = self.begin(|calls| calls.generate += 1)?;
        if self.script().makes_none {
            return Err(ProviderError::new(ProviderErrorKind::Denied, "it makes no data keys"));
        }
        let data_key = DataKey::random();
        let wrapped = self.wrap_here(&data_key, context);
        Ok((if answer == Answer::WrongKey { DataKey::random() } else { data_key }, wrapped))
    }

    fn makes_many_at_once(&self) -> bool {
        self.script().many_at_once
    }

    fn generate_wrapped_key(&self, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        self.begin(|calls| calls.generate_wrapped += 1)?;
        Ok(self.wrap_here(&DataKey::random(), context))
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let answer = self.begin(|calls| calls.unwrap += 1)?;
        if !self.can_unwrap() {
            return Err(ProviderError::new(ProviderErrorKind::Credentials, "it only wraps"));
        }
        let data_key = self.unwrap_here(key_id, wrapped, context)?;
        Ok(if answer == Answer::WrongKey { DataKey::random() } else { data_key })
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let answer = self.begin(|calls| calls.wrap += 1)?;
        self.check_name(key_id)?;
        let other = DataKey::random();
        Ok(self.wrap_here(if answer == Answer::WrongKey { &other } else { data_key }, context))
    }

    fn rewrap(
        &self,
        from: &str,
        wrapped: &[u8],
        to: &str,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, ProviderError> {
        let answer = self.begin(|calls| calls.rewrap += 1)?;
        let data_key = self.unwrap_here(from, wrapped, context)?;
        self.check_name(to)?;
        let other = DataKey::random();
        Ok(self.wrap_here(if answer == Answer::WrongKey { &other } else { &data_key }, context))
    }

    /// Takes an answer like every call, but is not counted.
    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        self.begin(|_| {})?;
        Ok(KeyDescription {
            key_id: key_id.to_owned(),
            state: if key_id == self.key_id { KeyState::Enabled } else { KeyState::Unknown("no such key".to_owned()) },
            rotation: None,
            origin: Some("a script".to_owned()),
            multi_region: false,
            usage: "wrapping".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> EncryptionContext {
        EncryptionContext::volume_key(&[1; 16])
    }

    #[test]
    fn answers_rightly_until_told_otherwise() {
        let provider = ScriptedProvider::new("k", true);
        let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
        let unwrap = || provider.unwrap("k", &wrapped.bytes, &context());
        assert_eq!(unwrap().unwrap().expose(), data_key.expose());
        provider.then(Answer::WrongKey);
        provider.then(Answer::Fail(ProviderErrorKind::Denied));
        assert_ne!(unwrap().unwrap().expose(), data_key.expose());
        assert_eq!(unwrap().err().unwrap().kind, ProviderErrorKind::Denied);
        assert!(unwrap().is_ok());
        provider.always(Answer::Fail(ProviderErrorKind::Unavailable));
        assert_eq!(unwrap().err().unwrap().kind, ProviderErrorKind::Unavailable);
        assert_eq!(provider.calls(), Calls { generate: 1, unwrap: 5, ..Calls::default() });
        assert!(provider.is_remote());
    }

    #[test]
    fn refuses_what_a_true_provider_would() {
        let provider = ScriptedProvider::new("k", false);
        let wrapped = provider.wrap_here(&DataKey::random(), &context());
        let kind = |id: &str, context| provider.unwrap(id, &wrapped.bytes, &context).err().unwrap().kind;
        assert_eq!(kind("other", context()), ProviderErrorKind::KeyNotFound);
        assert_eq!(kind("k", EncryptionContext::volume_key(&[2; 16])), ProviderErrorKind::Tampered);
    }

    #[test]
    fn holds_its_callers_until_released() {
        let provider = ScriptedProvider::new("k", false);
        provider.hold();
        std::thread::scope(|scope| {
            let calls: Vec<_> =
                (0..3).map(|_| scope.spawn(|| provider.generate_data_key(&context()).is_ok())).collect();
            provider.until_waiting(3);
            assert!(calls.iter().all(|call| !call.is_finished()));
            provider.release();
            assert!(calls.into_iter().all(|call| call.join().unwrap()));
        });
        assert_eq!(provider.calls().generate, 3);
    }
}
