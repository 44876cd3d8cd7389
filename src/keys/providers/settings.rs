//! What providers need to know beyond the names of keys.

use std::path::PathBuf;
use std::time::Duration;

use super::super::Trail;
use super::Passphrase;

/// What providers need to know beyond the key's name.
#[derive(Debug, Default)]
pub struct ProviderSettings {
    /// The keyring file of the local provider, if not where the volume's config says.
    pub keyring: Option<PathBuf>,
    /// Opens a keyring that is sealed under a passphrase; a keyring that is not does not need it.
    pub passphrase: Option<Passphrase>,
    /// Settings of AWS KMS.
    pub aws: AwsSettings,
    /// Settings of OpenBao and Vault.
    pub vault: VaultSettings,
    /// Settings of PKCS #11.
    pub pkcs11: Pkcs11Settings,
    /// Settings of age.
    pub age: AgeSettings,
    /// Where every call of a provider is recorded.
    pub trail: Option<Trail>,
}

/// Settings of AWS KMS. What is not set here comes from where every AWS program takes it: environment, profile,
/// instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AwsSettings {
    /// The Region of keys that are not named by ARN; an ARN names its own.
    pub region: Option<String>,
    /// The URL to send requests to instead of the Region's own.
    pub endpoint: Option<String>,
    /// Whether to use the FIPS 140 endpoints.
    pub fips: bool,
    /// The longest wait for one attempt.
    pub attempt_timeout: Duration,
    /// The longest wait for one operation, with all its attempts.
    pub operation_timeout: Duration,
}

impl Default for AwsSettings {
    fn default() -> Self {
        Self {
            region: None,
            endpoint: None,
            fips: false,
            attempt_timeout: Duration::from_secs(2),
            operation_timeout: Duration::from_secs(6),
        }
    }
}

/// Settings of OpenBao and Vault. A token comes from the file named here, or from where their own programs take it: the
/// variables `BAO_TOKEN` and `VAULT_TOKEN`, the file `.vault-token` in the home directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultSettings {
    /// The URL of the server; `http` only on this machine.
    pub address: Option<String>,
    /// The namespace in which keys and logins are.
    pub namespace: Option<String>,
    /// A file of the certificates that alone are trusted.
    pub ca_bundle: Option<PathBuf>,
    /// A file that holds a token, and may hold another one later.
    pub token_file: Option<PathBuf>,
    /// The AppRole to log in with instead of a token.
    pub role_id: Option<String>,
    /// A file that holds the secret id of the AppRole.
    pub secret_id_file: Option<PathBuf>,
    /// Where the AppRole method is mounted.
    pub approle_mount: String,
    /// The longest wait for one attempt.
    pub attempt_timeout: Duration,
    /// The longest wait for one operation, with all its attempts.
    pub operation_timeout: Duration,
}

impl Default for VaultSettings {
    fn default() -> Self {
        let AwsSettings { attempt_timeout, operation_timeout, .. } = AwsSettings::default();
        Self {
            address: None,
            namespace: None,
            ca_bundle: None,
            token_file: None,
            role_id: None,
            secret_id_file: None,
            approle_mount: "approle".to_owned(),
            attempt_timeout,
            operation_timeout,
        }
    }
}

/// Settings of age.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgeSettings {
    /// A file of identities, as `age-keygen` writes it; without it recipients only wrap.
    pub identity_file: Option<PathBuf>,
}

/// Settings of PKCS #11.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pkcs11Settings {
    /// The module to load, which becomes a part of this process.
    pub module: Option<PathBuf>,
    /// A file that holds the PIN of the token.
    pub pin_file: Option<PathBuf>,
    /// The longest wait for one operation.
    pub operation_timeout: Duration,
}

impl Default for Pkcs11Settings {
    fn default() -> Self {
        Self { module: None, pin_file: None, operation_timeout: AwsSettings::default().operation_timeout }
    }
}
