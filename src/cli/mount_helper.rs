//! How mount(8) calls a helper: `mount.kmsfs SOURCE DIR [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]`, and, by way of
//! mount.fuse3, `kmsfs SOURCE DIR [-o OPTIONS]`. Both come to `kmsfs mount`.

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::mount_options::MountFlags;

/// The arguments as the command line knows them.
pub(crate) fn as_command(arguments: Vec<OsString>) -> Vec<OsString> {
    let name = arguments.first().and_then(|name| Path::new(name).file_name()).unwrap_or_default();
    let is_helper = name.as_encoded_bytes().starts_with(b"mount.");
    let is_path = |argument: Option<&OsString>| argument.is_some_and(|a| a.as_encoded_bytes().starts_with(b"/"));
    if is_helper || is_path(arguments.get(1)) && is_path(arguments.get(2)) {
        translate(&arguments[1..])
    } else {
        arguments
    }
}

fn translate(arguments: &[OsString]) -> Vec<OsString> {
    let mut command: Vec<OsString> = vec!["kmsfs".into(), "mount".into()];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_encoded_bytes() {
            b"-o" => rest.next().into_iter().for_each(|list| command.extend(options(list))),
            b"-t" | b"-N" => drop(rest.next()),
            b"-s" | b"-n" | b"-v" | b"-sn" | b"-nv" => {}
            // mount(8) wants to see everything but the mount itself: there is nothing else.
            b"-f" => return vec!["kmsfs".into(), "--version".into()],
            _ => command.push(argument.clone()),
        }
    }
    command
}

/// Options with a value, or that are not mount options, are flags of the command: `keyring=/k,no_prefetch` is
/// `--keyring /k --no-prefetch`.
fn options(list: &OsStr) -> Vec<OsString> {
    let Some(list) = list.to_str() else { return vec!["-o".into(), list.to_owned()] };
    let is_remount = list.split(',').any(|option| option == "remount");
    let mut ours = Vec::new();
    let mut flags = Vec::new();
    for option in list.split(',').filter(|option| !option.is_empty()) {
        if is_remount || MountFlags::parse(&[option.to_owned()]).is_ok() {
            ours.push(option);
            continue;
        }
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        flags.push(OsString::from(format!("--{}", name.replace('_', "-"))));
        flags.extend(value.map(OsString::from));
    }
    if !ours.is_empty() {
        flags.extend(["-o".into(), ours.join(",").into()]);
    }
    flags
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
        let expected = ["kmsfs", "mount", "/c", "/m", "--keyring", "/k", "--no-prefetch", "-o", "ro,_netdev"];
        assert_eq!(
            command(&["/sbin/mount.kmsfs", "/c", "/m", "-s", "-o", "ro,keyring=/k,_netdev,no_prefetch"]),
            expected
        );
        assert_eq!(command(&["kmsfs", "/c", "/m", "-o", "keyring=/k,no_prefetch,ro,_netdev"]), expected);
        assert_eq!(command(&["mount.fuse.kmsfs", "/c", "/m"]), ["kmsfs", "mount", "/c", "/m"]);
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
