//! What the environment says: variables, and the places that follow from them.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

/// What a variable says.
type Lookup = Box<dyn Fn(&str) -> Option<OsString>>;

/// The environment of this process, or one made for a test.
pub(crate) struct Environment {
    lookup: Lookup,
    root: bool,
}

/// The users of this machine.
const USERS: &str = "/etc/passwd";

/// The home of a user, for whom mount(8) runs a helper without `HOME`: `fstab` lines with `user` or `users`.
fn home_of(user: u32, users: &str) -> Option<OsString> {
    let mut entries = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = entries.find(|fields| fields.get(2).is_some_and(|id| id.parse() == Ok(user)))?;
    entry.get(5).filter(|home| home.starts_with('/')).map(OsString::from)
}

impl Environment {
    /// This process's.
    pub(crate) fn of_process() -> Self {
        let user = rustix::process::geteuid();
        // Looked up now: the sandbox takes the list of users away.
        let needs_home = !user.is_root() && env::var_os("HOME").is_none();
        let users = if needs_home { fs::read_to_string(USERS).unwrap_or_default() } else { String::new() };
        let home = home_of(user.as_raw(), &users);
        let lookup = move |name: &str| env::var_os(name).or_else(|| home.clone().filter(|_| name == "HOME"));
        Self { lookup: Box::new(lookup), root: user.is_root() }
    }

    /// Made up.
    #[cfg(test)]
    pub(crate) fn of(root: bool, variables: &[(&str, &str)]) -> Self {
        let variables: Vec<(String, OsString)> = variables.iter().map(|(n, v)| ((*n).to_owned(), v.into())).collect();
        let lookup = move |name: &str| variables.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        Self { lookup: Box::new(lookup), root }
    }

    /// A variable; an empty one counts as absent.
    pub(crate) fn get(&self, name: &str) -> Option<OsString> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    /// A variable whose emptiness is an answer: one that is set counts, whatever it holds.
    pub(crate) fn get_even_empty(&self, name: &str) -> Option<OsString> {
        (self.lookup)(name)
    }

    /// A variable that must be absolute to count, as the XDG specification wants it.
    fn directory(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from).filter(|path| path.is_absolute())
    }

    fn xdg(&self, name: &str, below_home: &str) -> Option<PathBuf> {
        let directory = self.directory(name).or_else(|| Some(self.directory("HOME")?.join(below_home)));
        Some(directory?.join("kmsfs"))
    }

    /// Where keyrings and remembered volumes lie. Root's units and root's shells have one place.
    pub(crate) fn data_directory(&self) -> Option<PathBuf> {
        if self.root && self.directory("XDG_DATA_HOME").is_none() {
            return Some(PathBuf::from("/var/lib/kmsfs"));
        }
        self.xdg("XDG_DATA_HOME", ".local/share")
    }

    /// Where the logs of background mounts lie.
    pub(crate) fn log_directory(&self) -> Option<PathBuf> {
        if self.root && self.directory("XDG_STATE_HOME").is_none() {
            return Some(PathBuf::from("/var/log/kmsfs"));
        }
        self.xdg("XDG_STATE_HOME", ".local/state")
    }

    /// The settings files that are read where they exist, the most important first.
    pub(crate) fn config_files(&self) -> Vec<PathBuf> {
        let user = self.xdg("XDG_CONFIG_HOME", ".config").map(|directory| directory.join("config.toml"));
        user.into_iter().chain([PathBuf::from("/etc/kmsfs/config.toml")]).collect()
    }

    /// Where this user's sockets go.
    pub(crate) fn runtime_directory(&self) -> Option<PathBuf> {
        self.directory("XDG_RUNTIME_DIR")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn places_follow_xdg_then_home_then_root() {
        let xdg = Environment::of(false, &[("XDG_DATA_HOME", "/d"), ("XDG_STATE_HOME", "/s"), ("HOME", "/h")]);
        assert_eq!(xdg.data_directory().unwrap(), Path::new("/d/kmsfs"));
        assert_eq!(xdg.log_directory().unwrap(), Path::new("/s/kmsfs"));
        let home = Environment::of(false, &[("XDG_DATA_HOME", "relative"), ("HOME", "/h")]);
        assert_eq!(home.data_directory().unwrap(), Path::new("/h/.local/share/kmsfs"));
        assert_eq!(home.log_directory().unwrap(), Path::new("/h/.local/state/kmsfs"));
        // A unit sets the first, a shell the second, cron neither.
        for variables in [("XDG_DATA_HOME", "/var/lib"), ("HOME", "/root"), ("HOME", "")] {
            let root = Environment::of(true, &[variables]);
            assert_eq!(root.data_directory().unwrap(), Path::new("/var/lib/kmsfs"));
            assert_eq!(root.log_directory().unwrap(), Path::new("/var/log/kmsfs"));
        }
        let users = "root:x:0:0::/root:/bin/sh\nanna:x:1000:1000:Anna,,,:/home/anna:/bin/sh\nodd:x:7\n+::::::\n";
        assert_eq!(home_of(1000, users).unwrap(), "/home/anna");
        assert_eq!((home_of(7, users), home_of(8, users)), (None, None));
        let nobody = Environment::of(false, &[]);
        assert_eq!((nobody.data_directory(), nobody.log_directory()), (None, None));
    }
}
