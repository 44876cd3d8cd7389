//! The providers beside AWS KMS and the local keyring, against the programs that they are made for: a server of OpenBao, the
//! program age, the module SoftHSM.

#[cfg(feature = "age")]
mod age;
#[cfg(feature = "vault")]
mod bao;
#[cfg(all(feature = "mount", feature = "vault", feature = "age", feature = "pkcs11"))]
mod memory;
#[cfg(all(feature = "mount", feature = "vault", feature = "age", feature = "pkcs11"))]
mod mounts;
#[cfg(feature = "pkcs11")]
mod pkcs11;
#[cfg(feature = "vault")]
mod vault;

use kmsfs::crypto::DataKey;
use kmsfs::keys::{EncryptionContext, Provider, ProviderError, ProviderErrorKind};

/// Another one for each number.
fn context(number: u8) -> EncryptionContext {
    EncryptionContext::data_key(&[1; 16], &[number; 16])
}

fn kind_of<T>(result: Result<T, ProviderError>) -> ProviderErrorKind {
    result.err().expect("a failure").kind
}

/// What every provider must do that can unwrap: give back what it wrapped, to the same context, and nothing else.
fn keeps_its_promises(provider: &dyn Provider) {
    let (data_key, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let unwrap = |bytes: &[u8], context: &EncryptionContext| provider.unwrap(&wrapped.key_id, bytes, context);
    assert_eq!(unwrap(&wrapped.bytes, &context(1)).unwrap().expose(), data_key.expose());
    assert_eq!(kind_of(unwrap(&wrapped.bytes, &context(2))), ProviderErrorKind::Tampered, "another context");
    for at in [0, wrapped.bytes.len() / 2, wrapped.bytes.len() - 2] {
        let mut changed = wrapped.bytes.clone();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(kind_of(unwrap(&changed, &context(1))), ProviderErrorKind::Tampered, "byte {at}");
    }
    for bad in [&[][..], &wrapped.bytes[..10], &[0; 7000]] {
        assert_eq!(kind_of(unwrap(bad, &context(1))), ProviderErrorKind::Tampered, "{} bytes", bad.len());
    }
    let given = DataKey::random();
    let again = provider.wrap(&wrapped.key_id, &given, &context(3)).unwrap();
    assert_eq!(again.key_id, wrapped.key_id);
    assert_eq!(unwrap(&again.bytes, &context(3)).unwrap().expose(), given.expose());
    let moved = provider.rewrap(&wrapped.key_id, &again.bytes, &wrapped.key_id, &context(3)).unwrap();
    assert_ne!(moved.bytes, again.bytes);
    assert_eq!(unwrap(&moved.bytes, &context(3)).unwrap().expose(), given.expose());
    let described = provider.describe(&wrapped.key_id).unwrap();
    assert_eq!(described.key_id, wrapped.key_id);
    assert_eq!(described.state.advice(), None, "{described}");
}

/// Many callers at once, each of whom gets back his own keys.
fn serves_many_callers(provider: &dyn Provider, key_id: &str) {
    std::thread::scope(|scope| {
        for number in 0..16 {
            scope.spawn(move || {
                for _ in 0..20 {
                    let given = DataKey::random();
                    let wrapped = provider.wrap(key_id, &given, &context(number)).unwrap();
                    let back = provider.unwrap(key_id, &wrapped.bytes, &context(number)).unwrap();
                    assert_eq!(back.expose(), given.expose());
                }
            });
        }
    });
}
