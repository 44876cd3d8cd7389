//! What a mount reaches after its start: the paths and connections that its sandbox grants, and the variables that its process
//! keeps.
//!
//! Files that others replace by renaming (credentials, certificates, what the resolver reads) are granted by way of their
//! directory: a rule for a file would go with the file.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::daemon::sandbox::Reach;
use crate::format::config::VolumeConfig;
use crate::keys::ProviderKind;
use crate::keys::providers;

use super::environment::Environment;
use super::settings::Settings;

/// Variables that name a file of the AWS SDK or of its TLS.
const NAMES_FILE: [&str; 6] = [
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CA_BUNDLE",
    "SSL_CERT_FILE",
];
/// What names and certificates are looked up in.
const SYSTEM: [&str; 8] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/var/lib/ca-certificates",
];
/// Variables that a mount in the background keeps, by how their names begin.
const KEPT: [&str; 24] = [
    "AWS_",
    "BAO_",
    "VAULT_",
    "PKCS11_",
    "SOFTHSM2_",
    "KMSFS_",
    "XDG_",
    "HOME",
    "PATH",
    "LANG",
    "LC_",
    "TZ",
    "USER",
    "LOGNAME",
    "TMPDIR",
    "SSL_CERT_",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
    "RUST_BACKTRACE",
    "JOURNAL_STREAM",
];

/// The places of one mount.
pub(crate) struct Places<'a> {
    pub(crate) cipher_directory: &'a Path,
    pub(crate) sockets: &'a Path,
    /// Where the log is begun once the volume is mounted; none if it is open already.
    pub(crate) logs: Option<&'a Path>,
    /// Directories of what watches the mount.
    pub(crate) watched: Vec<PathBuf>,
    /// Whether the volume must still be remembered.
    pub(crate) is_new: bool,
}

/// What a mount of the volume of `config`, whose seal is not yet checked, reaches.
pub(crate) fn of_mount(
    places: &Places<'_>,
    config: &VolumeConfig,
    settings: &Settings,
    environment: &Environment,
) -> Reach {
    let has = |kind: ProviderKind| config.wrapping_keys.iter().any(|key| key.provider == kind.name());
    let is_local = |provider: &str| provider == ProviderKind::Local.name();
    let module = has(ProviderKind::Pkcs11);
    let network = has(ProviderKind::AwsKms) || has(ProviderKind::Vault) || module;
    let programs = has(ProviderKind::AwsKms) && starts_programs(environment);
    let mut reach = Reach {
        everything: vec![places.cipher_directory.to_owned()],
        make: vec![places.sockets.to_owned()],
        read: vec![PathBuf::from("/proc")],
        network,
        programs,
        // A module may talk to a service, and a program to an agent.
        local_sockets: module || programs,
        abstract_sockets: environment
            .get("NOTIFY_SOCKET")
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"@")),
    };
    reach.read.extend(settings.keyring.iter().map(|keyring| around(keyring)));
    let local = config.wrapping_keys.iter().filter(|key| is_local(&key.provider));
    let located = local.filter_map(|key| Some((Path::new(key.location.as_ref()?), &key.key)));
    // The seal is not checked yet: whoever writes the cipher directory chooses these, and gets no more than keyrings.
    reach.read.extend(located.filter(|(file, id)| providers::is_keyring_with(file, id)).map(|(file, _)| around(file)));
    reach.read.extend(settings.age.identity_file.iter().map(|file| around(file)));
    reach.make.extend(places.watched.iter().cloned());
    if module {
        // It is code of somebody else, with files, devices and sockets that nobody here knows.
        reach.everything.push(PathBuf::from("/"));
    }
    reach.make.extend(places.logs.map(Path::to_owned));
    if let Some(data) = environment.data_directory() {
        if places.is_new { &mut reach.make } else { &mut reach.read }.push(data);
    }
    if network {
        reach.read.extend(SYSTEM.map(PathBuf::from));
        reach.read.extend(of_aws(environment));
        reach.read.extend(of_vault(settings, environment));
    }
    if programs {
        reach.read.push(PathBuf::from("/"));
        // Where programs that sign in keep what they were given.
        reach.everything.extend(aws_directory(environment));
    }
    reach
}

/// What the AWS SDK reads.
fn of_aws(environment: &Environment) -> Vec<PathBuf> {
    let named = NAMES_FILE.into_iter().filter_map(|name| environment.get(name)).map(|file| around(Path::new(&file)));
    let directories = environment.get("SSL_CERT_DIR").map(PathBuf::from).into_iter().chain(aws_directory(environment));
    named.chain(directories).collect()
}

/// What the provider of OpenBao and Vault reads.
fn of_vault(settings: &Settings, environment: &Environment) -> Vec<PathBuf> {
    let named = [&settings.vault.ca_bundle, &settings.vault.token_file, &settings.vault.secret_id_file];
    let usual = environment.get("HOME").map(|home| Path::new(&home).join(".vault-token"));
    named.into_iter().flatten().map(|file| around(file)).chain(usual).collect()
}

fn aws_directory(environment: &Environment) -> Option<PathBuf> {
    environment.get("HOME").map(|home| Path::new(&home).join(".aws"))
}

/// The directory of a file; what is none, or lies in the root directory, is granted by itself.
fn around(file: &Path) -> PathBuf {
    let is_device = fs::metadata(file).is_ok_and(|found| !found.is_file());
    match file.parent() {
        Some(parent) if !is_device && parent.components().count() > 1 => parent.to_owned(),
        _ => file.to_owned(),
    }
}

/// Whether a profile of the AWS SDK gets its credentials from a program.
pub(crate) fn starts_programs(environment: &Environment) -> bool {
    let usual = |name: &str| aws_directory(environment).map(|directory| directory.join(name));
    let file = |variable: &str, name: &str| environment.get(variable).map(PathBuf::from).or_else(|| usual(name));
    let files = [file("AWS_CONFIG_FILE", "config"), file("AWS_SHARED_CREDENTIALS_FILE", "credentials")];
    files
        .into_iter()
        .flatten()
        .any(|path| fs::read_to_string(path).is_ok_and(|text| text.contains("credential_process")))
}

/// Whether a process in the background keeps the variable `name`. A program that gives credentials may need any of them.
pub(crate) fn keeps_variable(name: &OsStr) -> bool {
    KEPT.iter().any(|kept| name.as_encoded_bytes().starts_with(kept.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::config::{End, Holes, WrappingKey};

    fn reach(provider: &str, variables: &[(&str, &str)]) -> Reach {
        reach_at(provider, "/keys/ring.toml", variables)
    }

    fn reach_at(provider: &str, location: &str, variables: &[(&str, &str)]) -> Reach {
        let mut config = VolumeConfig::new([7; 16], "xaes-256-gcm", Holes::Allow, End::Lenient, 1);
        let location = (provider == "local").then(|| location.to_owned());
        config.wrapping_keys.push(WrappingKey { provider: provider.into(), key: "k".into(), location });
        let places = Places {
            cipher_directory: Path::new("/c"),
            sockets: Path::new("/s"),
            logs: None,
            watched: Vec::new(),
            is_new: false,
        };
        let environment = Environment::of(false, variables);
        let settings = Settings::load(&Default::default(), &environment).unwrap();
        of_mount(&places, &config, &settings, &environment)
    }

    fn reads(reach: &Reach, path: &str) -> bool {
        reach.read.iter().any(|granted| Path::new(path).starts_with(granted))
    }

    #[test]
    fn a_local_keyring_needs_no_network_and_nothing_of_the_system() {
        let variables =
            [("HOME", "/nowhere"), ("AWS_CA_BUNDLE", "/ca/bundle.pem"), ("KMSFS_KEYRING", "/keys/ring.toml")];
        let local = reach("local", &variables);
        assert!(!local.network && !local.programs && !local.local_sockets);
        assert!(reads(&local, "/keys/ring.toml") && !reads(&local, "/other/ring.toml"));
        assert!(
            !reads(&local, "/etc/shadow") && !reads(&local, "/ca/bundle.pem") && !reads(&local, "/nowhere/.ssh/id")
        );
    }

    /// Before the seal of the config is checked.
    #[test]
    fn a_volume_names_no_place_but_of_a_keyring() {
        let directory = tempfile::tempdir().unwrap();
        let [keyring, other] = ["ring.toml", "secret"].map(|name| directory.path().join(name));
        providers::create_local(&keyring, None).unwrap();
        let text = fs::read_to_string(&keyring).unwrap();
        let read = |file: &Path| {
            let name = file.to_str().unwrap();
            reads(&reach_at("local", name, &[("HOME", "/nowhere")]), name)
        };
        assert!(!read(&keyring), "it is that of another key");
        let id = text.split('"').find(|part| part.starts_with("k-")).unwrap();
        fs::write(&keyring, text.replace(id, "k")).unwrap();
        assert!(read(&keyring));
        fs::write(&other, "\"k\"").unwrap();
        fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        assert!(!read(&other) && !read(Path::new("/home/other/.ssh/id")));
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&keyring, Some(1), None).unwrap();
            assert!(!read(&keyring), "it is a stranger's");
        }
    }

    #[test]
    fn a_kms_needs_credentials_certificates_and_a_resolver() {
        let remote =
            reach("aws-kms", &[("HOME", "/nowhere"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/run/secrets/aws/token")]);
        assert!(remote.network && !remote.programs && !remote.local_sockets);
        for needed in ["/run/secrets/aws/token", "/etc/resolv.conf", "/nowhere/.aws/config"] {
            assert!(reads(&remote, needed), "{needed}");
        }
        assert!(!reads(&remote, "/nowhere/.ssh/id") && !reads(&remote, "/run/secrets/other"));
        assert!(!reads(&reach("aws-kms", &[("AWS_CONFIG_FILE", "/dev/null")]), "/dev/sda"));
        assert!(!reads(&reach("aws-kms", &[("AWS_CONFIG_FILE", "/config")]), "/root"));
    }

    #[test]
    fn a_profile_with_a_process_may_start_programs() {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("config");
        fs::write(&config, "[default]\ncredential_process = /bin/true\n").unwrap();
        let variables = [("AWS_CONFIG_FILE", config.to_str().unwrap()), ("HOME", "/nowhere")];
        let remote = reach("aws-kms", &variables);
        assert!(remote.programs && remote.local_sockets && reads(&remote, "/bin/true"));
        assert!(!reach("local", &variables).programs);
    }

    #[test]
    fn only_what_is_needed_stays_in_the_environment() {
        for kept in ["AWS_PROFILE", "KMSFS_REGION", "HOME", "PATH", "https_proxy", "SSL_CERT_FILE"] {
            assert!(keeps_variable(OsStr::new(kept)), "{kept}");
        }
        for dropped in ["LD_PRELOAD", "GITHUB_TOKEN", "SSH_AUTH_SOCK", "DATABASE_URL", "MALLOC_CONF"] {
            assert!(!keeps_variable(OsStr::new(dropped)), "{dropped}");
        }
    }
}
