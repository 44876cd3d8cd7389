//! `-o OPTIONS`, as mount(8) and fstab write them.

use rustix::mount::MountFlags as Vfs;

use super::error::CliError;

/// What the options of a mount come to; the later of two that contradict each other wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MountFlags {
    pub(crate) read_only: bool,
    pub(crate) allow_other: bool,
    pub(crate) suid: bool,
    pub(crate) dev: bool,
    pub(crate) noexec: bool,
    pub(crate) noatime: bool,
    pub(crate) noxattr: bool,
    pub(crate) low_latency: bool,
    /// What the kernel does with every filesystem alike.
    pub(crate) vfs: Vfs,
    /// Change the options of what is mounted already.
    pub(crate) remount: bool,
}

/// Options that mean something to mount(8) or an init system, or are how it is anyway, and nothing here.
const NOT_OURS: [&str; 18] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "group",
    "owner",
    "nofail",
    "_netdev",
    "_rnetdev",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "nomand",
    "norelatime",
    "nostrictatime",
];
const NOT_OURS_PREFIXES: [&str; 6] = ["x-", "X-", "comment=", "user=", "uhelper=", "helper="];
/// Options that the kernel heeds by itself, and whether they set it or clear it.
const VFS: [(&str, Vfs, bool); 10] = [
    ("nodiratime", Vfs::NODIRATIME, true),
    ("diratime", Vfs::NODIRATIME, false),
    ("strictatime", Vfs::STRICTATIME, true),
    ("lazytime", Vfs::LAZYTIME, true),
    ("nolazytime", Vfs::LAZYTIME, false),
    ("sync", Vfs::SYNCHRONOUS, true),
    ("async", Vfs::SYNCHRONOUS, false),
    ("dirsync", Vfs::DIRSYNC, true),
    ("nosymfollow", NOSYMFOLLOW, true),
    ("symfollow", NOSYMFOLLOW, false),
];
/// `MS_NOSYMFOLLOW` in the kernel's `include/uapi/linux/mount.h`, which rustix lacks.
const NOSYMFOLLOW: Vfs = Vfs::from_bits_retain(1 << 8);
/// The options by name, for people.
pub(crate) const KNOWN: &str = "ro, rw, allow_other, suid, nosuid, dev, nodev, exec, noexec, noatime, relatime, xattr, noxattr, lowlatency, \
     nolowlatency, remount, and of mount(8)'s atime, (no)diratime, strictatime, (no)lazytime, (a)sync, dirsync, (no)symfollow";

impl Default for MountFlags {
    fn default() -> Self {
        Self {
            read_only: false,
            allow_other: false,
            suid: false,
            dev: false,
            noexec: false,
            noatime: false,
            noxattr: false,
            low_latency: false,
            vfs: Vfs::empty(),
            remount: false,
        }
    }
}

impl MountFlags {
    /// Parses comma lists. With `remount` among them mount(8) adds what it finds in the mount table, so that options that
    /// are not ours are passed over.
    pub(crate) fn parse(lists: &[String]) -> Result<Self, CliError> {
        let mut flags = Self::default();
        let options = || lists.iter().flat_map(|list| list.split(','));
        flags.remount = options().any(|option| option == "remount");
        for option in options() {
            match flags.set(option) {
                Err(_) if flags.remount => {}
                result => result?,
            }
        }
        Ok(flags)
    }

    fn set(&mut self, option: &str) -> Result<(), CliError> {
        match option {
            "ro" => self.read_only = true,
            "remount" => self.remount = true,
            "rw" => self.read_only = false,
            "allow_other" => self.allow_other = true,
            "suid" => self.suid = true,
            "nosuid" => self.suid = false,
            "dev" => self.dev = true,
            "nodev" => self.dev = false,
            "exec" => self.noexec = false,
            "noexec" => self.noexec = true,
            "noatime" => self.noatime = true,
            "relatime" | "atime" => {
                self.noatime = false;
                self.vfs.remove(Vfs::STRICTATIME);
            }
            "noxattr" => self.noxattr = true,
            "xattr" => self.noxattr = false,
            "lowlatency" => self.low_latency = true,
            "nolowlatency" => self.low_latency = false,
            _ if NOT_OURS.contains(&option) || NOT_OURS_PREFIXES.iter().any(|prefix| option.starts_with(prefix)) => {}
            _ => {
                if let Some((_, flag, on)) = VFS.iter().find(|(name, ..)| *name == option) {
                    self.vfs.set(*flag, *on);
                    return Ok(());
                }
                let unknown = format!("-o {option}: there is no such mount option");
                return Err(CliError::usage(unknown).hint(format_args!("the options are {KNOWN}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lists: &[&str]) -> Result<MountFlags, CliError> {
        MountFlags::parse(&lists.iter().map(|list| (*list).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn every_option_does_what_it_says() {
        let all = MountFlags {
            read_only: true,
            allow_other: true,
            suid: true,
            dev: true,
            noexec: true,
            noatime: true,
            noxattr: true,
            low_latency: true,
            vfs: Vfs::empty(),
            remount: false,
        };
        assert_eq!(parse(&["ro,allow_other,suid", "dev,noexec,noatime,noxattr,lowlatency"]).unwrap(), all);
        let undone = "rw,nosuid,nodev,exec,relatime,xattr,nolowlatency";
        let undone = parse(&["ro,suid,dev,noexec,noatime,noxattr,lowlatency", undone]).unwrap();
        assert_eq!(undone, MountFlags::default());
        assert_eq!(
            parse(&["defaults,auto,noauto,user,nofail,_netdev,x-systemd.automount"]).unwrap(),
            MountFlags::default()
        );
    }

    #[test]
    fn what_mount8_passes_of_the_vfs_is_passed_on() {
        for (list, expected) in [
            ("nodiratime", Vfs::NODIRATIME),
            ("strictatime,lazytime", Vfs::STRICTATIME | Vfs::LAZYTIME),
            ("sync,dirsync", Vfs::SYNCHRONOUS | Vfs::DIRSYNC),
            ("nosymfollow,nodiratime,diratime", NOSYMFOLLOW),
            ("strictatime,sync,lazytime,nosymfollow,relatime,async,nolazytime,symfollow", Vfs::empty()),
            (
                "users,group,owner,nouser,_rnetdev,silent,loud,iversion,nomand,norelatime,comment=a=b,X-mount.mkdir",
                Vfs::empty(),
            ),
        ] {
            assert_eq!(parse(&[list]).unwrap(), MountFlags { vfs: expected, ..MountFlags::default() }, "{list}");
        }
    }

    #[test]
    fn a_remount_passes_over_what_the_mount_table_adds() {
        let flags = parse(&["rw,relatime,user_id=0,default_permissions,remount,ro"]).unwrap();
        assert_eq!(flags, MountFlags { read_only: true, remount: true, ..MountFlags::default() });
    }

    #[test]
    fn an_unknown_option_lists_the_known_ones() {
        for bad in ["allow_root", "", "ro,,rw", "RO", "uid=0", "mand", "comment"] {
            assert_eq!(parse(&[bad]).unwrap_err().code(), 2, "{bad}");
        }
    }
}
