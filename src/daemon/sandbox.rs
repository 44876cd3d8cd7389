//! What a process that serves a mount can still reach: Landlock for files, TCP and signals, a seccomp filter for system calls.
//! It is entered before the first key is there, and for good.
//!
//! Invariants:
//! * entered by the only thread there is: Landlock holds for the thread that enters and for what it starts;
//! * what the kernel does not have is told, and the rest holds all the same;
//! * a path that is granted is granted as what it is now: what replaces a directory later is not.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use serde::{Deserialize, Serialize};

use super::system_calls::{self, Needs};

/// The newest rules that are asked for; what an older kernel lacks of them is left out.
const NEWEST: ABI = ABI::V6;
/// How long threads that have nothing to do any more may take to end.
const OTHERS_END: Duration = Duration::from_secs(2);

/// What the process goes on to need. Paths that do not exist are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Files, and directories with everything below them, that it reads.
    pub read: Vec<PathBuf>,
    /// Directories in which it does everything but run programs.
    pub everything: Vec<PathBuf>,
    /// Directories in which it makes, writes and removes files and sockets.
    pub make: Vec<PathBuf>,
    /// Connections to other machines.
    pub network: bool,
    /// Sockets of the abstract kind, such as one of a service manager.
    pub abstract_sockets: bool,
    /// New sockets on this machine. Those that the process has made before it keeps.
    pub local_sockets: bool,
    /// To start programs: these run in the same sandbox, and may then read and run everything.
    pub programs: bool,
}

/// What holds this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// Whether files are out of reach but for those that are needed: `on` with the version of the kernel's interface, or why not.
    #[serde(rename = "sandbox_files")]
    pub files: String,
    /// Whether system calls are refused: `on`, or why not.
    #[serde(rename = "sandbox_system_calls")]
    pub system_calls: String,
    /// Which connections can be made: `any` or `none`.
    #[serde(rename = "sandbox_network")]
    pub network: String,
    /// Which programs can be started: `any` or `none`.
    #[serde(rename = "sandbox_programs")]
    pub programs: String,
}

impl Confinement {
    /// None at all, since the user wants it so.
    #[must_use]
    pub fn off() -> Self {
        let off = || "off".to_owned();
        let any = || "any".to_owned();
        Self { files: off(), system_calls: off(), network: any(), programs: any() }
    }

    /// What does not hold, in words; nothing if everything does.
    #[must_use]
    pub fn gaps(&self) -> Vec<String> {
        let parts = [("files", &self.files), ("system calls", &self.system_calls)];
        parts.iter().filter(|(_, how)| !how.starts_with("on")).map(|(what, how)| format!("{what}: {how}")).collect()
    }
}

/// Gives up everything but `reach`.
#[must_use]
pub fn enter(reach: &Reach) -> Confinement {
    let files = if wait_for_others() {
        restrict(reach).unwrap_or_else(|error| format!("not held: {error}"))
    } else {
        "not held: other threads are running".to_owned()
    };
    let Reach { network, programs, local_sockets, .. } = *reach;
    let needs = Needs { network, programs, local_sockets };
    let refused = system_calls::refuse(needs);
    let word = |yes: bool| if yes || refused.is_err() { "any" } else { "none" }.to_owned();
    Confinement {
        files,
        network: word(reach.network),
        programs: word(reach.programs),
        system_calls: refused.map_or_else(|error| format!("not held: {error}"), |()| "on".to_owned()),
    }
}

/// Whether this thread is, soon, the only one.
fn wait_for_others() -> bool {
    let until = Instant::now() + OTHERS_END;
    loop {
        if fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() == 1) {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Enters Landlock; says how much of it there is.
fn restrict(reach: &Reach) -> Result<String, RulesetError> {
    // Without `Refer` the kernel refuses every rename and link from one directory to another: no filesystem could be served.
    let needed = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let Ok(rules) = needed.handle_access(AccessFs::from_all(ABI::V2)) else {
        return Ok("not held: the kernel is older than 5.19, or runs without Landlock".to_owned());
    };
    let mut rules = rules
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::Signal)?;
    if !reach.network {
        rules = rules.handle_access(AccessNet::ConnectTcp)?;
    }
    if !reach.abstract_sockets {
        rules = rules.scope(Scope::AbstractUnixSocket)?;
    }
    let reading = AccessFs::from_read(NEWEST);
    let read = if reach.programs { reading } else { reading & !AccessFs::Execute };
    let write = AccessFs::from_all(NEWEST) & !AccessFs::Execute;
    let make = AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::RemoveFile
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::ReadFile
        | AccessFs::ReadDir;
    let granted = [(&reach.read, read), (&reach.everything, write), (&reach.make, make)];
    let grants = granted.iter().flat_map(|(paths, access)| paths.iter().map(|path| (path.as_path(), *access)));
    let device = (Path::new("/dev/null"), AccessFs::ReadFile | AccessFs::WriteFile);
    let grants = grants.chain([device]).filter_map(|(path, access)| grant(path, access));
    let status = rules.create()?.add_rules(grants.map(Ok::<_, RulesetError>))?.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => "not held: the kernel has no Landlock".to_owned(),
        (_, LandlockStatus::Available { effective_abi, .. }) => format!("on (Landlock {})", effective_abi as i32),
        (_, other) => format!("not held: {other:?}"),
    })
}

/// The rule for what is at `path`: a file can be given no rights of a directory.
fn grant(path: &Path, access: BitFlags<AccessFs>) -> Option<PathBeneath<PathFd>> {
    let is_directory = fs::metadata(path).ok()?.is_dir();
    let access = if is_directory { access } else { access & AccessFs::from_file(NEWEST) };
    Some(PathBeneath::new(PathFd::new(path).ok()?, access))
}
