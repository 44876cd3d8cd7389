//! Settings of the providers that have some of their own: a table each in a settings file, flags with the provider's name.

use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;

use crate::keys::providers::{AgeSettings, AwsSettings, Pkcs11Settings, VaultSettings};

use super::environment::Environment;
use super::error::CliError;
use super::settings::variable;

/// The headings of the help below which they stand.
pub(super) const VAULT: &str = "OpenBao and Vault";
pub(super) const PKCS11: &str = "PKCS #11";
pub(super) const AGE: &str = "age";

/// What one source says of OpenBao and Vault.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = VAULT)]
pub(super) struct VaultLayer {
    /// The URL of OpenBao or Vault [default: BAO_ADDR or VAULT_ADDR]
    #[arg(id = "vault_address", long = "vault-address", value_name = "URL")]
    address: Option<String>,
    /// The namespace in OpenBao or Vault [default: BAO_NAMESPACE or VAULT_NAMESPACE]
    #[arg(id = "vault_namespace", long = "vault-namespace", value_name = "PATH")]
    namespace: Option<String>,
    /// Trust only the certificates in this file [default: BAO_CACERT or VAULT_CACERT, or what the system trusts]
    #[arg(id = "vault_ca_bundle", long = "vault-ca-bundle", value_name = "FILE")]
    ca_bundle: Option<PathBuf>,
    /// Read the token from this file [default: BAO_TOKEN or VAULT_TOKEN, or ~/.vault-token]
    #[arg(id = "vault_token_file", long = "vault-token-file", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Log in with this AppRole instead of a token
    #[arg(id = "vault_role_id", long = "vault-role-id", value_name = "ID")]
    role_id: Option<String>,
    /// Read the secret id of the AppRole from this file
    #[arg(id = "vault_secret_id_file", long = "vault-secret-id-file", value_name = "FILE")]
    secret_id_file: Option<PathBuf>,
    /// Where the AppRole method is mounted [default: approle]
    #[arg(id = "vault_approle_mount", long = "vault-approle-mount", value_name = "PATH")]
    approle_mount: Option<String>,
}

/// What one source says of PKCS #11.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = PKCS11)]
pub(super) struct Pkcs11Layer {
    /// Load this module of PKCS #11
    #[arg(id = "pkcs11_module", long = "pkcs11-module", value_name = "FILE")]
    module: Option<PathBuf>,
    /// Read the PIN of the token from this file
    #[arg(id = "pkcs11_pin_file", long = "pkcs11-pin-file", value_name = "FILE")]
    pin_file: Option<PathBuf>,
}

/// What one source says of age.
#[derive(Clone, Debug, Default, PartialEq, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = AGE)]
pub(super) struct AgeLayer {
    /// Unwrap what is under age recipients with the identities in this file
    #[arg(id = "age_identity", long = "age-identity", value_name = "FILE")]
    identity: Option<PathBuf>,
}

impl VaultLayer {
    /// Fills the gaps from a less important source.
    pub(super) fn or(self, lower: Self) -> Self {
        Self {
            address: self.address.or(lower.address),
            namespace: self.namespace.or(lower.namespace),
            ca_bundle: self.ca_bundle.or(lower.ca_bundle),
            token_file: self.token_file.or(lower.token_file),
            role_id: self.role_id.or(lower.role_id),
            secret_id_file: self.secret_id_file.or(lower.secret_id_file),
            approle_mount: self.approle_mount.or(lower.approle_mount),
        }
    }

    /// Also from the variables that the programs of OpenBao and Vault know.
    pub(super) fn of_environment(environment: &Environment) -> Result<Self, CliError> {
        let path = |name: &str| environment.get(name).map(PathBuf::from);
        let first = |names: [&str; 3]| {
            let found = names.into_iter().find(|name| environment.get(name).is_some());
            found.map_or(Ok(None), |name| variable(environment, name))
        };
        Ok(Self {
            address: first(["KMSFS_VAULT_ADDRESS", "BAO_ADDR", "VAULT_ADDR"])?,
            namespace: first(["KMSFS_VAULT_NAMESPACE", "BAO_NAMESPACE", "VAULT_NAMESPACE"])?,
            ca_bundle: ["KMSFS_VAULT_CA_BUNDLE", "BAO_CACERT", "VAULT_CACERT"].into_iter().find_map(path),
            token_file: path("KMSFS_VAULT_TOKEN_FILE"),
            role_id: variable(environment, "KMSFS_VAULT_ROLE_ID")?,
            secret_id_file: path("KMSFS_VAULT_SECRET_ID_FILE"),
            approle_mount: variable(environment, "KMSFS_VAULT_APPROLE_MOUNT")?,
        })
    }

    /// With the timeouts that hold for every KMS.
    pub(super) fn settings(self, timeouts: &AwsSettings) -> Result<VaultSettings, CliError> {
        Ok(VaultSettings {
            address: self.address,
            namespace: self.namespace,
            ca_bundle: absolute(self.ca_bundle)?,
            token_file: absolute(self.token_file)?,
            role_id: self.role_id,
            secret_id_file: absolute(self.secret_id_file)?,
            approle_mount: self.approle_mount.unwrap_or(VaultSettings::default().approle_mount),
            attempt_timeout: timeouts.attempt_timeout,
            operation_timeout: timeouts.operation_timeout,
        })
    }
}

impl Pkcs11Layer {
    /// Fills the gaps from a less important source.
    pub(super) fn or(self, lower: Self) -> Self {
        Self { module: self.module.or(lower.module), pin_file: self.pin_file.or(lower.pin_file) }
    }

    /// From our own variables.
    pub(super) fn of_environment(environment: &Environment) -> Self {
        let path = |name: &str| environment.get(name).map(PathBuf::from);
        Self { module: path("KMSFS_PKCS11_MODULE"), pin_file: path("KMSFS_PKCS11_PIN_FILE") }
    }

    /// With the timeout that holds for every KMS.
    pub(super) fn settings(self, timeouts: &AwsSettings) -> Result<Pkcs11Settings, CliError> {
        // The name of a module without a slash is one that the system's loader finds.
        let module =
            self.module.map(|path| if path.components().count() > 1 { absolute(Some(path)) } else { Ok(Some(path)) });
        Ok(Pkcs11Settings {
            module: module.transpose()?.flatten(),
            pin_file: absolute(self.pin_file)?,
            operation_timeout: timeouts.operation_timeout,
        })
    }
}

impl AgeLayer {
    /// Fills the gaps from a less important source.
    pub(super) fn or(self, lower: Self) -> Self {
        Self { identity: self.identity.or(lower.identity) }
    }

    /// From our own variable.
    pub(super) fn of_environment(environment: &Environment) -> Self {
        Self { identity: environment.get("KMSFS_AGE_IDENTITY").map(PathBuf::from) }
    }

    /// What the provider needs.
    pub(super) fn settings(self) -> Result<AgeSettings, CliError> {
        Ok(AgeSettings { identity_file: absolute(self.identity)? })
    }
}

/// A process in the background leaves the directory that it was started in.
fn absolute(path: Option<PathBuf>) -> Result<Option<PathBuf>, CliError> {
    let absolute = path.map(|path| std::path::absolute(&path).map_err(|error| CliError::io(path.display(), &error)));
    absolute.transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn our_own_variables_win_over_those_of_other_programs() {
        let of = |variables: &[(&str, &str)]| {
            let layer = VaultLayer::of_environment(&Environment::of(false, variables)).unwrap();
            layer.settings(&AwsSettings::default()).unwrap()
        };
        let all = [("VAULT_ADDR", "c"), ("BAO_ADDR", "b"), ("KMSFS_VAULT_ADDRESS", "a"), ("VAULT_CACERT", "/ca")];
        assert_eq!(of(&all).address.as_deref(), Some("a"));
        assert_eq!(of(&all[..2]).address.as_deref(), Some("b"));
        assert_eq!(of(&all[..1]).address.as_deref(), Some("c"));
        assert_eq!(of(&all).ca_bundle.as_deref(), Some(Path::new("/ca")));
        assert_eq!(of(&[]).approle_mount, "approle");
    }
}
