//! Recipients of age against the program age: each opens what the other made.

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use kmsfs::keys::providers::{AgeSettings, ProviderSettings, open};
use kmsfs::keys::{Provider, ProviderErrorKind, ProviderKind};

use super::{context, keeps_its_promises, kind_of};

/// Runs a program of age, which must succeed, with this input; what it prints.
fn run(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}: .ci/run installs it"));
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A new identity file, and its recipient.
pub(crate) fn new_identity(directory: &Path, name: &str) -> (PathBuf, String) {
    let path = directory.join(name);
    std::fs::write(&path, run("age-keygen", &[], b"")).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let recipient = String::from_utf8(run("age-keygen", &["-y", path.to_str().unwrap()], b"")).unwrap();
    (path, recipient.trim().to_owned())
}

pub(crate) fn provider(recipient: &str, identity: Option<&Path>) -> Arc<dyn Provider> {
    let age = AgeSettings { identity_file: identity.map(Path::to_owned) };
    open(ProviderKind::Age, recipient, None, &ProviderSettings { age, ..ProviderSettings::default() }).unwrap()
}

#[test]
fn a_recipient_keeps_the_promises_of_a_provider() {
    let directory = tempfile::tempdir().unwrap();
    let (identity, recipient) = new_identity(directory.path(), "id");
    let whole = provider(&recipient, Some(&identity));
    assert!(!whole.is_remote() && whole.can_unwrap());
    keeps_its_promises(whole.as_ref());
    let public = provider(&recipient, None);
    assert!(!public.can_unwrap());
    let (data_key, wrapped) = public.generate_data_key(&context(1)).unwrap();
    assert_eq!(kind_of(public.unwrap(&recipient, &wrapped.bytes, &context(1))), ProviderErrorKind::Credentials);
    assert_eq!(whole.unwrap(&recipient, &wrapped.bytes, &context(1)).unwrap().expose(), data_key.expose());
}

#[test]
fn the_program_opens_what_is_wrapped_here_and_its_files_open_here() {
    let directory = tempfile::tempdir().unwrap();
    let (identity, recipient) = new_identity(directory.path(), "id");
    let (other_identity, other) = new_identity(directory.path(), "other");
    let provider = provider(&recipient, Some(&identity));
    let (data_key, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let content = run("age", &["--decrypt", "-i", identity.to_str().unwrap()], &wrapped.bytes);
    assert_eq!(content.len(), 64);
    assert_eq!(content[32..], data_key.expose()[..]);
    // With another recipient before, whose stanza must be skipped; and the other one opens it as well.
    let file = run("age", &["-r", &other, "-r", &recipient], &content);
    let unwrap = |bytes: &[u8], number| provider.unwrap(&recipient, bytes, &context(number));
    assert_eq!(unwrap(&file, 1).unwrap().expose(), data_key.expose());
    assert_eq!(run("age", &["--decrypt", "-i", other_identity.to_str().unwrap()], &file), content);
    assert_eq!(kind_of(unwrap(&file, 2)), ProviderErrorKind::Tampered, "another context");
    for (what, file) in [
        ("for somebody else", run("age", &["-r", &other], &content)),
        ("too short", run("age", &["-r", &recipient], &content[1..])),
        ("too long", run("age", &["-r", &recipient], &[content.as_slice(), b"x"].concat())),
        ("armored", run("age", &["--armor", "-r", &recipient], &content)),
    ] {
        assert_eq!(kind_of(unwrap(&file, 1)), ProviderErrorKind::Tampered, "{what}");
    }
}
