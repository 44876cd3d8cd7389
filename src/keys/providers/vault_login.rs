//! The token that OpenBao or Vault knows this host by: where it comes from, and keeping it alive.
//!
//! Invariants: one caller logs in, the others wait for it, no longer than their own deadline; no lock is held meanwhile; a token
//! is wiped when it is given up; the thread that renews it ends with the provider.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::VaultSettings;
use super::secret_file::read_line;
use super::vault_client::{Client, Refusal, Request};

/// The longest token or secret id, in bytes.
const MAX_SECRET_LEN: usize = 8192;
/// The variables that hold a token, the most important first.
const TOKEN_VARIABLES: [&str; 2] = ["BAO_TOKEN", "VAULT_TOKEN"];
/// The file in which `bao login` and `vault login` leave one, in the home directory.
const USUAL_FILE: &str = ".vault-token";
/// A token is not used in the last part of its life, in which it could end on the way.
const MARGIN: Duration = Duration::from_secs(2);
/// The soonest that renewing is tried again.
const SOONEST: Duration = Duration::from_secs(1);
/// The longest sleep between two looks at what there is to renew.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

/// Where tokens come from.
enum Source {
    Variable(&'static str),
    File(PathBuf),
    AppRole { mount: String, role_id: String, secret_id: Option<PathBuf> },
}

/// A token, wiped on drop.
pub(super) struct Token {
    pub(super) text: Zeroizing<String>,
}

/// What is known of the token in use.
struct Current {
    token: Arc<Token>,
    life: Life,
}

#[derive(Clone, Copy)]
enum Life {
    /// It was given, and the server was not asked yet.
    Unknown,
    /// It has no end, or nothing can be done about it.
    Endless,
    Until {
        end: Instant,
        renew: Instant,
        renewable: bool,
    },
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    /// Somebody is getting a token.
    busy: bool,
    renewing: bool,
    closed: bool,
}

/// See the module.
pub(super) struct Login {
    client: Arc<Client>,
    source: Option<Source>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Login {
    /// Chooses where tokens come from; asks nobody.
    ///
    /// # Errors
    /// `Misconfigured` if the settings cannot work.
    pub(super) fn new(settings: &VaultSettings, client: Arc<Client>) -> Result<Arc<Self>, ProviderError> {
        let source = choose(settings, |name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))?;
        Ok(Arc::new(Self { client, source, state: Mutex::default(), changed: Condvar::new() }))
    }

    /// A token that has not ended.
    ///
    /// # Errors
    /// `Credentials` if there is none to be had, or what kept the server from giving one.
    pub(super) fn token(self: &Arc<Self>, deadline: Instant) -> Result<Arc<Token>, Refusal> {
        let mut state = self.state();
        loop {
            if let Some(current) = &state.current
                && !matches!(current.life, Life::Until { end, .. } if Instant::now() + MARGIN >= end)
            {
                return Ok(Arc::clone(&current.token));
            }
            if !state.busy {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err((ProviderErrorKind::Unavailable, "logging in takes too long".to_owned()));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.busy = true;
        drop(state);
        let obtained = self.obtain(deadline);
        let mut state = self.state();
        state.busy = false;
        let token = obtained.map(|current| {
            let token = Arc::clone(&current.token);
            state.current = Some(current);
            token
        });
        self.start_renewing(&mut state);
        drop(state);
        self.changed.notify_all();
        token
    }

    /// The server knows `token` no longer: another one, if there is one.
    ///
    /// # Errors
    /// As [`Self::token`].
    pub(super) fn replace(self: &Arc<Self>, token: &Arc<Token>, deadline: Instant) -> Result<Arc<Token>, Refusal> {
        let mut state = self.state();
        if state.current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.token, token)) {
            state.current = None;
        }
        drop(state);
        let other = self.token(deadline)?;
        if other.text == token.text {
            return Err((ProviderErrorKind::Credentials, "the token has expired or was revoked".to_owned()));
        }
        Ok(other)
    }

    /// Ends the thread that renews.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    fn obtain(&self, deadline: Instant) -> Result<Current, Refusal> {
        let refuse = |error: ProviderError| (error.kind, error.message);
        let text = match &self.source {
            None => return Err((ProviderErrorKind::Credentials, NO_TOKEN.to_owned())),
            Some(Source::Variable(name)) => {
                let value = Zeroizing::new(std::env::var(name).unwrap_or_default());
                check_token(&value).map_err(|why| (ProviderErrorKind::Credentials, format!("{name}: {why}")))?;
                value
            }
            Some(Source::File(path)) => read_line(path, "the token file", MAX_SECRET_LEN).map_err(refuse)?,
            Some(Source::AppRole { mount, role_id, secret_id }) => {
                let secret = secret_id.as_ref().map(|path| read_line(path, "the secret id file", MAX_SECRET_LEN));
                return self.log_in(mount, role_id, secret.transpose().map_err(refuse)?, deadline);
            }
        };
        Ok(Current { token: Arc::new(Token { text }), life: Life::Unknown })
    }

    fn log_in(
        &self,
        mount: &str,
        role_id: &str,
        secret_id: Option<Zeroizing<String>>,
        deadline: Instant,
    ) -> Result<Current, Refusal> {
        let [role, secret] = [role_id, secret_id.as_ref().map_or("", |secret| secret.as_str())].map(quoted);
        let mut body = Zeroizing::new(String::with_capacity(role.len() + secret.len() + 40));
        for part in ["{\"role_id\":", &role, ",\"secret_id\":", &secret, "}"] {
            body.push_str(part);
        }
        let answer = self.client.send(&format!("auth/{mount}/login"), None, &Request::Post(body.as_bytes()), deadline);
        let answer = answer.map_err(|(kind, why)| match kind {
            // Whatever the server has against the login, other credentials are what helps.
            ProviderErrorKind::BadAnswer | ProviderErrorKind::Denied | ProviderErrorKind::KeyNotFound => {
                (ProviderErrorKind::Credentials, format!("the login with an AppRole at auth/{mount} is refused: {why}"))
            }
            kind => (kind, format!("logging in: {why}")),
        })?;
        let auth = parse::<LoginAnswer<'_>>(&answer).and_then(|answer| answer.auth);
        let auth = auth.filter(|auth| check_token(auth.client_token).is_ok());
        let auth = auth.ok_or((ProviderErrorKind::BadAnswer, "the answer to the login holds no token".to_owned()))?;
        let text = Zeroizing::new(auth.client_token.to_owned());
        Ok(Current { token: Arc::new(Token { text }), life: life(auth.lease_duration, auth.renewable) })
    }

    fn start_renewing(self: &Arc<Self>, state: &mut State) {
        if state.renewing || state.current.is_none() {
            return;
        }
        let login = Arc::clone(self);
        let thread = std::thread::Builder::new().name("kms-token".to_owned()).spawn(move || login.renew_for_ever());
        state.renewing = thread.is_ok();
        if let Err(error) = thread {
            tracing::warn!("the token will not be renewed: no thread for it: {error}");
        }
    }

    fn renew_for_ever(self: Arc<Self>) {
        let mut state = self.state();
        while !state.closed {
            let due = state.current.as_ref().map(|current| (Arc::clone(&current.token), current.life));
            let sleep = match &due {
                Some((_, Life::Unknown)) => Duration::ZERO,
                Some((_, Life::Until { renew, .. })) => renew.saturating_duration_since(Instant::now()),
                Some((_, Life::Endless)) | None => LONGEST_SLEEP,
            };
            if !sleep.is_zero() {
                let sleep = sleep.min(LONGEST_SLEEP);
                state = self.changed.wait_timeout(state, sleep).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            if let Some((token, life)) = due {
                self.refresh(&token, life);
            }
            state = self.state();
        }
    }

    /// Learns how long `token` lives, or makes it live longer, or gets another one.
    fn refresh(&self, token: &Arc<Token>, life: Life) {
        let deadline = self.client.deadline();
        let next = match life {
            Life::Endless => return,
            Life::Unknown => self.ask_life(token, deadline),
            Life::Until { end, renewable, .. } => {
                let renewed = if renewable { self.renew(token, end, deadline) } else { None };
                renewed.or_else(|| self.other(deadline)).unwrap_or_else(|| {
                    let left = end.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        tracing::warn!("Vault: the token has expired, and there is no other one yet");
                        return Current { token: Arc::clone(token), life: Life::Endless };
                    }
                    let renew = Instant::now() + (left / 4).max(SOONEST);
                    Current { token: Arc::clone(token), life: Life::Until { end, renew, renewable } }
                })
            }
        };
        let mut state = self.state();
        if state.current.as_ref().is_some_and(|current| Arc::ptr_eq(&current.token, token)) {
            state.current = Some(next);
        }
    }

    fn ask_life(&self, token: &Arc<Token>, deadline: Instant) -> Current {
        let answer = self.client.send("auth/token/lookup-self", Some(&token.text), &Request::Get, deadline);
        let data = answer.ok().and_then(|answer| parse::<LookupAnswer>(&answer)?.data);
        let life = data.map_or(Life::Endless, |data| life(data.ttl, data.renewable));
        Current { token: Arc::clone(token), life }
    }

    /// `token` with a life beyond `before`; none if it does not get one, as at the end of what it may have in all.
    fn renew(&self, token: &Arc<Token>, before: Instant, deadline: Instant) -> Option<Current> {
        let request = Request::Post(b"{}");
        match self.client.send("auth/token/renew-self", Some(&token.text), &request, deadline) {
            Ok(answer) => {
                let auth = parse::<LoginAnswer<'_>>(&answer)?.auth?;
                let life = life(auth.lease_duration, auth.renewable);
                let gains = !matches!(life, Life::Until { end, .. } if end < before + SOONEST);
                gains.then(|| Current { token: Arc::clone(token), life })
            }
            Err((_, why)) => {
                tracing::debug!("Vault: the token is not renewed: {why}");
                None
            }
        }
    }

    /// A token from a source that gives several.
    fn other(&self, deadline: Instant) -> Option<Current> {
        if matches!(self.source, None | Some(Source::Variable(_))) {
            return None;
        }
        match self.obtain(deadline) {
            Ok(current) => {
                let old = self.state().current.as_ref().map(|current| Arc::clone(&current.token));
                (old.is_none_or(|old| old.text != current.token.text)).then_some(current)
            }
            Err((_, why)) => {
                tracing::warn!("Vault: no new token before this one expires: {why}");
                None
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What to do if nothing says where a token is.
const NO_TOKEN: &str = "there is no token: give one in BAO_TOKEN, VAULT_TOKEN or --vault-token-file, log in with \
                        `bao login`, or name an AppRole with --vault-role-id and --vault-secret-id-file";

fn choose(settings: &VaultSettings, is_set: impl Fn(&str) -> bool) -> Result<Option<Source>, ProviderError> {
    let misconfigured = |why: &str| Err(ProviderError::new(ProviderErrorKind::Misconfigured, format!("Vault: {why}")));
    if let Some(role_id) = &settings.role_id {
        let mount = settings.approle_mount.trim_matches('/').to_owned();
        if mount.is_empty() || !mount.split('/').all(super::vault::is_path_segment) {
            return misconfigured("the mount of the AppRole method is not a path");
        }
        let secret_id = settings.secret_id_file.clone();
        return Ok(Some(Source::AppRole { mount, role_id: role_id.clone(), secret_id }));
    }
    if settings.secret_id_file.is_some() {
        return misconfigured("a secret id is of no use without --vault-role-id");
    }
    if let Some(path) = &settings.token_file {
        return Ok(Some(Source::File(path.clone())));
    }
    if let Some(name) = TOKEN_VARIABLES.into_iter().find(|name| is_set(name)) {
        return Ok(Some(Source::Variable(name)));
    }
    let usual = std::env::home_dir().map(|home| home.join(USUAL_FILE)).filter(|path| path.exists());
    Ok(usual.map(Source::File))
}

/// Whether a header can carry it.
fn check_token(token: &str) -> Result<(), &'static str> {
    match token.bytes().all(|byte| byte.is_ascii_graphic()) && (1..=MAX_SECRET_LEN).contains(&token.len()) {
        true => Ok(()),
        false => Err("this is no token"),
    }
}

/// A string of JSON, wiped on drop.
fn quoted(text: &str) -> Zeroizing<String> {
    Zeroizing::new(serde_json::Value::from(text).to_string())
}

/// Renewed when two thirds of it are over.
fn life(seconds: u64, renewable: bool) -> Life {
    if seconds == 0 {
        return Life::Endless;
    }
    let (now, lease) = (Instant::now(), Duration::from_secs(seconds));
    match (now.checked_add(lease), now.checked_add(lease / 3 * 2)) {
        (Some(end), Some(renew)) => Life::Until { end, renew, renewable },
        _ => Life::Endless,
    }
}

#[derive(Deserialize)]
struct LoginAnswer<'a> {
    #[serde(borrow)]
    auth: Option<Auth<'a>>,
}

#[derive(Deserialize)]
struct Auth<'a> {
    client_token: &'a str,
    #[serde(default)]
    lease_duration: u64,
    #[serde(default)]
    renewable: bool,
}

#[derive(Deserialize)]
struct LookupAnswer {
    data: Option<Lookup>,
}

#[derive(Deserialize)]
struct Lookup {
    #[serde(default)]
    ttl: u64,
    #[serde(default)]
    renewable: bool,
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Option<T> {
    serde_json::from_slice(body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(settings: &VaultSettings, set: &[&str]) -> String {
        match choose(settings, |name| set.contains(&name)) {
            Ok(Some(Source::Variable(name))) => name.to_owned(),
            Ok(Some(Source::File(path))) => path.display().to_string(),
            Ok(Some(Source::AppRole { mount, role_id, .. })) => format!("{mount} {role_id}"),
            Ok(None) => "none".to_owned(),
            Err(error) => error.message,
        }
    }

    #[test]
    fn a_token_comes_from_the_most_important_source() {
        let both = ["VAULT_TOKEN", "BAO_TOKEN"];
        let mut settings = VaultSettings::default();
        assert_eq!(chosen(&settings, &both), "BAO_TOKEN");
        assert_eq!(chosen(&settings, &both[..1]), "VAULT_TOKEN");
        settings.token_file = Some("/run/token".into());
        assert_eq!(chosen(&settings, &both), "/run/token");
        settings.role_id = Some("r".to_owned());
        assert_eq!(chosen(&settings, &both), "approle r");
        settings.approle_mount = "a b".to_owned();
        assert!(chosen(&settings, &[]).contains("not a path"));
        let lonely = VaultSettings { secret_id_file: Some("/s".into()), ..VaultSettings::default() };
        assert!(chosen(&lonely, &both).contains("role-id"));
    }

    #[test]
    fn what_a_header_cannot_carry_is_no_token() {
        for good in ["s.abc", "hvs.CAESI-_x"] {
            check_token(good).unwrap();
        }
        for bad in ["", "a b", "a\r\nX-Vault-Token: b", "\u{e9}", &"x".repeat(MAX_SECRET_LEN + 1)] {
            check_token(bad).unwrap_err();
        }
    }

    #[test]
    fn a_lease_is_renewed_before_it_ends() {
        let Life::Until { end, renew, renewable } = life(300, true) else { panic!("it ends") };
        assert!(renewable && renew < end && renew > Instant::now());
        assert!(matches!(life(0, true), Life::Endless));
        assert!(matches!(life(u64::MAX, true), Life::Endless));
    }
}
