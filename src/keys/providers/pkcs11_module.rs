//! A module of PKCS #11 at work: sessions on threads of their own, because a module may take as long as it likes.
//!
//! Invariants: nobody waits for a module beyond the deadline; a module is loaded and initialised once in a process, by the
//! first call, so after any fork; a PIN that was wrong is not tried again, which would lock the token; sessions that broke are
//! opened again once for a call; a provider that ends takes its threads along, so that none is in a module whose code ends
//! with the process.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::object::{Attribute, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use zeroize::Zeroizing;

use super::super::ProviderErrorKind;
use super::Pkcs11Settings;
use super::pkcs11_uri::KeyName;
use super::secret_file::read_line;

/// Calls of one provider that the module may work on at once.
const MAX_WORKERS: usize = 4;
const MAX_PIN_LEN: usize = 256;
/// How long a provider that ends waits for its threads.
const MAX_END: Duration = Duration::from_secs(1);

/// Why a call came to nothing.
pub(super) type Refusal = (ProviderErrorKind, String);

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// The threads of one provider. They end with it, but for one that its module does not give back.
pub(super) struct Workers {
    settings: Arc<Pkcs11Settings>,
    /// `None` only while this is dropped.
    queue: Option<Sender<Job>>,
    jobs: Arc<Mutex<Receiver<Job>>>,
    /// Each thread holds a sender, which it drops last of all.
    alive: Option<Sender<Infallible>>,
    ended: Mutex<Receiver<Infallible>>,
    /// Threads, and jobs that are queued or worked on.
    threads: Mutex<usize>,
    pending: Arc<AtomicUsize>,
    bad_pin: Arc<Mutex<Option<Zeroizing<String>>>>,
}

/// One thread and its session.
pub(super) struct Worker {
    settings: Arc<Pkcs11Settings>,
    open: Option<Open>,
    bad_pin: Arc<Mutex<Option<Zeroizing<String>>>>,
}

/// A session on a token, and the keys that were found in it.
pub(super) struct Open {
    pub(super) session: Session,
    module: Pkcs11,
    slot: Slot,
    keys: HashMap<String, ObjectHandle>,
}

impl Workers {
    pub(super) fn new(settings: &Pkcs11Settings) -> Self {
        let (queue, jobs) = mpsc::channel();
        let (alive, ended) = mpsc::channel();
        Self {
            settings: Arc::new(settings.clone()),
            queue: Some(queue),
            jobs: Arc::new(Mutex::new(jobs)),
            alive: Some(alive),
            ended: Mutex::new(ended),
            threads: Mutex::default(),
            pending: Arc::default(),
            bad_pin: Arc::default(),
        }
    }

    /// What `work` returns, which gets a session on the key's token and the key. It may run twice.
    ///
    /// # Errors
    /// [`Refusal`]; `Unavailable` at the deadline.
    pub(super) fn run<T: Send + 'static>(
        &self,
        key: &KeyName,
        work: impl Fn(&Open, ObjectHandle) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Refusal> {
        let deadline = Instant::now() + self.settings.operation_timeout;
        let (answer, answered) = mpsc::sync_channel(1);
        let (key, pending) = (key.clone(), Arc::clone(&self.pending));
        pending.fetch_add(1, Ordering::Relaxed);
        let job: Job = Box::new(move |worker| {
            // Nobody waits any longer.
            if Instant::now() < deadline {
                // Nor now, perhaps.
                let _ = answer.send(worker.call(&key, &work));
            }
            pending.fetch_sub(1, Ordering::Relaxed);
        });
        let gone = || (ProviderErrorKind::Unavailable, "its threads have ended".to_owned());
        self.queue.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        self.start_thread()?;
        match answered.recv_timeout(self.settings.operation_timeout) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                let why = format!("the module does not answer within {:?}", self.settings.operation_timeout);
                Err((ProviderErrorKind::Unavailable, why))
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    /// One more thread if all that there are have something to do.
    fn start_thread(&self) -> Result<(), Refusal> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if *threads == MAX_WORKERS || *threads >= self.pending.load(Ordering::Relaxed) {
            return Ok(());
        }
        let jobs = Arc::clone(&self.jobs);
        let mut worker =
            Worker { settings: Arc::clone(&self.settings), open: None, bad_pin: Arc::clone(&self.bad_pin) };
        let alive = self.alive.clone();
        let started = std::thread::Builder::new().name("kms-pkcs11".to_owned()).spawn(move || {
            loop {
                let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(job) = job else { break };
                job(&mut worker);
            }
            // Its session is closed in the module.
            drop(worker);
            drop(alive);
        });
        match started {
            Ok(_) => *threads += 1,
            Err(_) if *threads > 0 => {}
            Err(error) => return Err((ProviderErrorKind::Unavailable, format!("no thread for it: {error}"))),
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        (self.queue, self.alive) = (None, None);
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        // All have ended, or one hangs in its module.
        let _ = ended.recv_timeout(MAX_END);
    }
}

impl Worker {
    fn call<T>(
        &mut self,
        key: &KeyName,
        work: &impl Fn(&Open, ObjectHandle) -> Result<T, Error>,
    ) -> Result<T, Refusal> {
        let first = self.attempt(key, work);
        match first {
            Err(Failed::Module(error)) if is_broken_session(&error) => {
                self.open = None;
                self.attempt(key, work).map_err(Failed::refusal)
            }
            first => first.map_err(Failed::refusal),
        }
    }

    fn attempt<T>(
        &mut self,
        key: &KeyName,
        work: &impl Fn(&Open, ObjectHandle) -> Result<T, Error>,
    ) -> Result<T, Failed> {
        let mut open = match self.open.take() {
            Some(open) if open.is_for(key)? => open,
            _ => self.connect(key)?,
        };
        let handle = open.find(key)?;
        let result = work(&open, handle);
        self.open = Some(open);
        result.map_err(Failed::Module)
    }

    fn connect(&self, key: &KeyName) -> Result<Open, Failed> {
        let path = self.settings.module.as_deref();
        let path = path.ok_or_else(|| misconfigured("no module is named: --pkcs11-module or KMSFS_PKCS11_MODULE"))?;
        let module = load(path)?;
        let mut slots = Vec::new();
        for slot in module.get_slots_with_initialized_token()? {
            let info = module.get_token_info(slot)?;
            if key.is_on(info.label(), info.serial_number(), info.manufacturer_id(), info.model()) {
                slots.push((slot, info));
            }
        }
        let (slot, info) = match slots.len() {
            1 => slots.swap_remove(0),
            0 => return Err(Failed::Refused((ProviderErrorKind::KeyNotFound, "the token is not there".to_owned()))),
            several => return Err(misconfigured(&format!("{several} tokens have that name: add serial="))),
        };
        let session = module.open_ro_session(slot)?;
        if info.login_required() {
            self.log_in(&session, info.protected_authentication_path())?;
        }
        Ok(Open { session, module, slot, keys: HashMap::new() })
    }

    fn log_in(&self, session: &Session, has_own_keypad: bool) -> Result<(), Failed> {
        let credentials = |why: &str| Failed::Refused((ProviderErrorKind::Credentials, why.to_owned()));
        let pin = match &self.settings.pin_file {
            Some(path) => read_line(path, "the PIN", MAX_PIN_LEN)
                .map(Some)
                .map_err(|error| Failed::Refused((error.kind, error.message)))?,
            None if has_own_keypad => None,
            None => return Err(credentials("the token wants a PIN: name its file with --pkcs11-pin-file")),
        };
        if pin.is_some() && *self.bad_pin() == pin {
            return Err(credentials("the PIN was wrong before: it is not tried again, which could lock the token"));
        }
        let given = pin.as_ref().map(|pin| AuthPin::new(pin.as_str().into()));
        match session.login(UserType::User, given.as_ref()) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(error) => {
                if matches!(error, Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _))
                {
                    *self.bad_pin() = pin;
                }
                Err(Failed::Module(error))
            }
        }
    }

    fn bad_pin(&self) -> MutexGuard<'_, Option<Zeroizing<String>>> {
        self.bad_pin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    /// Whether the session is on the key's token.
    fn is_for(&self, key: &KeyName) -> Result<bool, Failed> {
        if self.keys.contains_key(&key.canonical()) {
            return Ok(true);
        }
        let info = self.module.get_token_info(self.slot)?;
        Ok(key.is_on(info.label(), info.serial_number(), info.manufacturer_id(), info.model()))
    }

    fn find(&mut self, key: &KeyName) -> Result<ObjectHandle, Failed> {
        let name = key.canonical();
        if let Some(handle) = self.keys.get(&name) {
            return Ok(*handle);
        }
        let mut template = vec![Attribute::Class(ObjectClass::SECRET_KEY), Attribute::KeyType(KeyType::AES)];
        template.extend(key.object.as_ref().map(|label| Attribute::Label(label.clone().into_bytes())));
        template.extend(key.id.clone().map(Attribute::Id));
        let found = self.session.find_objects(&template)?;
        match found[..] {
            [handle] => {
                self.keys.insert(name, handle);
                Ok(handle)
            }
            [] => Err(Failed::Refused((ProviderErrorKind::KeyNotFound, "the token has no such AES key".to_owned()))),
            _ => Err(misconfigured(&format!("{} AES keys have that name: add id=", found.len()))),
        }
    }
}

/// The modules that this process has loaded, or is about to.
static MODULES: Mutex<BTreeMap<PathBuf, Arc<Mutex<Option<Pkcs11>>>>> = Mutex::new(BTreeMap::new());

pub(super) fn have_loaded_a_module() -> bool {
    !MODULES.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
}

/// The module at `path`, initialised. It stays for as long as the process: other code in it may have threads of its own. One
/// that hangs keeps only those waiting who want it.
fn load(path: &Path) -> Result<Pkcs11, Failed> {
    let mut modules = MODULES.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = Arc::clone(modules.entry(path.to_owned()).or_default());
    drop(modules);
    let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(module) = &*loaded {
        return Ok(module.clone());
    }
    let module = Pkcs11::new(path)
        .map_err(|error| misconfigured(&format!("the module {} cannot be loaded: {error}", path.display())))?;
    match module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => {}
        Err(error) => return Err(Failed::Module(error)),
    }
    *loaded = Some(module.clone());
    Ok(module)
}

/// Why an attempt came to nothing.
enum Failed {
    Module(Error),
    Refused(Refusal),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Module(error)
    }
}

impl Failed {
    fn refusal(self) -> Refusal {
        match self {
            Self::Module(error) => (classify(&error), words(&error)),
            Self::Refused(refusal) => refusal,
        }
    }
}

fn misconfigured(why: &str) -> Failed {
    Failed::Refused((ProviderErrorKind::Misconfigured, why.to_owned()))
}

/// The module's own words, on one line.
fn words(error: &Error) -> String {
    match error {
        Error::Pkcs11(code, function) => format!("{function:?} failed with {code:?}"),
        other => other.to_string(),
    }
}

/// Whether another session may do better.
fn is_broken_session(error: &Error) -> bool {
    use RvError as R;
    matches!(
        error,
        Error::Pkcs11(
            R::SessionHandleInvalid
                | R::SessionClosed
                | R::DeviceRemoved
                | R::TokenNotPresent
                | R::UserNotLoggedIn
                | R::OperationActive
                | R::KeyHandleInvalid
                | R::ObjectHandleInvalid,
            _
        )
    )
}

fn classify(error: &Error) -> ProviderErrorKind {
    use RvError as R;
    let Error::Pkcs11(code, _) = error else { return ProviderErrorKind::Misconfigured };
    match code {
        R::PinIncorrect
        | R::PinInvalid
        | R::PinLenRange
        | R::PinExpired
        | R::PinLocked
        | R::UserNotLoggedIn
        | R::UserPinNotInitialized => ProviderErrorKind::Credentials,
        R::KeyHandleInvalid | R::ObjectHandleInvalid => ProviderErrorKind::KeyNotFound,
        R::KeyFunctionNotPermitted | R::ActionProhibited => ProviderErrorKind::KeyUnusable,
        R::EncryptedDataInvalid | R::EncryptedDataLenRange => ProviderErrorKind::Tampered,
        R::MechanismInvalid
        | R::MechanismParamInvalid
        | R::KeySizeRange
        | R::KeyTypeInconsistent
        | R::FunctionNotSupported
        | R::ArgumentsBad
        | R::CantLock
        | R::NeedToCreateThreads => ProviderErrorKind::Misconfigured,
        // Devices, tokens, sessions, memory: what may be better in a moment.
        _ => ProviderErrorKind::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that is in a module while the process ends would find the module torn down.
    #[test]
    fn a_provider_that_ends_takes_its_threads_along() {
        let workers = Workers::new(&Pkcs11Settings::default());
        let key = KeyName::parse("token=a;object=b").unwrap();
        let refused = workers.run(&key, |_, _| Ok(())).unwrap_err();
        assert_eq!(refused.0, ProviderErrorKind::Misconfigured);
        let settings = Arc::clone(&workers.settings);
        drop(workers);
        assert_eq!(Arc::strong_count(&settings), 1);
    }
}
