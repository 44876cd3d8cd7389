//! How mount(8) calls a helper: `mount.kmsfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`, and, by way of
//! mount.fuse3, `kmsfs SOURCE DIR [-o OPTIONS]`. Both come to `kmsfs mount`.
//!
//! mount(8) hands `nosuid` and `nodev` to a helper and keeps `suid` and `dev` to itself, since they are its defaults. They are
//! what a helper is asked for unless it hears otherwise, then: mount.fuse3 adds them, and so does this.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::Args as _;

use super::commands::mount::MountArgs;
use super::mount_options::MountFlags;

/// The arguments as the command line knows them.
pub(crate) fn as_command(arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().and_then(|name| Path::new(name).file_name()).unwrap_or_default();
    let is_helper = name.as_encoded_bytes().starts_with(b"mount.");
    let is_path = |argument: Option<&OsString>| argument.is_some_and(|a| a.as_encoded_bytes().starts_with(b"/"));
    if is_helper || is_path(arguments.get(1)) && is_path(arguments.get(2)) {
        translate(&arguments[1..], is_helper)
    } else {
        arguments
    }
}

fn translate(arguments: &[OsString], by_mount8: bool) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec!["kmsfs".into(), "mount".into()];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_encoded_bytes() {
            b"-o" => rest.next().into_iter().for_each(|list| command.extend(options(list, by_mount8))),
            b"-t" | b"-N" => drop(rest.next()),
            b"-s" | b"-n" | b"-v" | b"-sn" | b"-nv" => {}
            // mount(8) wants to see everything but the mount itself: there is nothing else.
            b"-f" => return vec!["kmsfs".into(), "--version".into()],
            _ => command.push(argument.clone()),
        }
    }
    command
}

/// What mount(8) means when it says nothing.
const DEFAULTS_OF_MOUNT8: [&str; 2] = ["suid", "dev"];

/// Options with a value, or that are not mount options, are flags of the command: `keyring=/k,no_prefetch` is
/// `--keyring /k --no-prefetch`.
fn options(list: &OsStr, by_mount8: bool) -> Vec<OsString> {
    let Some(list) = list.to_str() else { return vec!["-o".into(), list.to_owned()] };
    let is_remount = list.split(',').any(|option| option == "remount");
    let mut ours = if by_mount8 && !is_remount { DEFAULTS_OF_MOUNT8.to_vec() } else { Vec::new() };
    let mut flags = Vec::new();
    for option in list.split(',').filter(|option| !option.is_empty()) {
        if is_remount || MountFlags::parse(&[option.to_owned()]).is_ok() {
            ours.push(option);
            continue;
        }
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let flag = name.replace('_', "-");
        if !is_flag(&flag) {
            // It is refused there, by the name that was written.
            ours.push(option);
            continue;
        }
        flags.push(value.map_or(format!("--{flag}"), |value| format!("--{flag}={value}")).into());
    }
    if !ours.is_empty() {
        flags.extend(["-o".into(), ours.join(",").into()]);
    }
    flags
}

/// Whether `kmsfs mount` has a flag of this name.
fn is_flag(name: &str) -> bool {
    let mount = MountArgs::augment_args(clap::Command::new("mount"));
    mount.get_arguments().any(|arg| arg.get_long() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(arguments: &[&str]) -> Vec<String> {
        let arguments = arguments.iter().map(OsString::from).collect();
        as_command(arguments).into_iter().map(|argument| argument.into_string().unwrap()).collect()
    }

    #[test]
    fn a_helper_call_becomes_a_command() {
        let expected = ["kmsfs", "mount", "/c", "/m", "--keyring=/k", "--no-prefetch", "-o"];
        let with = |options| [&expected[..], &[options]].concat();
        assert_eq!(
            command(&["/sbin/mount.kmsfs", "/c", "/m", "-s", "-o", "ro,keyring=/k,_netdev,no_prefetch"]),
            with("suid,dev,ro,_netdev")
        );
        assert_eq!(command(&["kmsfs", "/c", "/m", "-o", "keyring=/k,no_prefetch,ro,_netdev"]), with("ro,_netdev"));
        assert_eq!(command(&["mount.fuse.kmsfs", "/c", "/m"]), ["kmsfs", "mount", "/c", "/m"]);
    }

    /// mount(8) says so of what it was told, and keeps `suid` and `dev` to itself.
    #[test]
    fn a_helper_adds_what_mount8_leaves_out() {
        let flags =
            |list: &str| MountFlags::parse(&[command(&["mount.kmsfs", "/c", "/m", "-o", list])[5].clone()]).unwrap();
        assert!(flags("rw").suid && flags("rw").dev);
        assert!(!flags("rw,nosuid").suid && flags("rw,nosuid").dev);
        assert!(!flags("rw,noexec,nosuid,nodev,user").suid && !flags("rw,nosuid,nodev,user").dev);
        let remount = command(&["mount.kmsfs", "/c", "/m", "-o", "rw,remount"]);
        assert_eq!(remount, ["kmsfs", "mount", "/c", "/m", "-o", "rw,remount"]);
    }

    #[test]
    fn what_is_neither_an_option_nor_a_flag_is_refused_by_its_name() {
        for (list, named) in [("foo", "foo"), ("ro,foo_bar=1", "foo_bar=1"), ("init=x,bar", "bar")] {
            let command = command(&["mount.kmsfs", "/c", "/m", "-o", list]);
            let refused = MountFlags::parse(&[command.last().unwrap().clone()]).unwrap_err();
            assert!(refused.to_string().contains(&format!("-o {named}:")), "{refused}");
        }
        let command = command(&["mount.kmsfs", "/c", "/m", "-o", "users,key_max_age=1h"]);
        assert_eq!(command[4..], ["--key-max-age=1h", "-o", "suid,dev,users"]);
    }

    #[test]
    fn a_remount_keeps_its_options_together() {
        let remount = command(&["kmsfs", "/c", "/m", "-o", "rw,user_id=0,remount,ro"]);
        assert_eq!(remount, ["kmsfs", "mount", "/c", "/m", "-o", "rw,user_id=0,remount,ro"]);
    }

    #[test]
    fn other_commands_stay_as_they_are() {
        for arguments in [&["kmsfs"][..], &["kmsfs", "mount", "/c", "/m"], &["kmsfs", "/c"], &["kmsfs", "status", "/m"]]
        {
            assert_eq!(command(arguments), arguments);
        }
    }
}
