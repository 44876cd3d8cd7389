//! The operations of AWS KMS on data keys.
//!
//! Invariants: every answer is checked before it is used (32 bytes, a wrapped key that a record can hold, the keys that
//! were asked for); no plaintext key of an answer is held across an await, formatted, or left unwiped. The plaintext that
//! Encrypt takes, and the bodies of answers, pass through buffers that the allocator wipes when they are freed.

use std::cell::RefCell;
use std::collections::HashMap;

use aws_sdk_kms::Client;
use aws_sdk_kms::error::SdkError;
use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::operation::decrypt::{DecryptError, DecryptOutput};
use aws_sdk_kms::operation::encrypt::{EncryptError, EncryptOutput};
use aws_sdk_kms::operation::generate_data_key::{GenerateDataKeyError, GenerateDataKeyOutput};
use aws_sdk_kms::operation::generate_data_key_without_plaintext::{
    GenerateDataKeyWithoutPlaintextError, GenerateDataKeyWithoutPlaintextOutput,
};
use aws_sdk_kms::operation::re_encrypt::{ReEncryptError, ReEncryptOutput};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use futures_util::future::join_all;
use zeroize::Zeroizing;

use super::super::{
    EncryptionContext, Generated, KeyDescription, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::aws_kms::{AwsKmsProvider, Call, check_key};
use super::{MAX_WRAPPED_LEN, aws_describe};
use crate::crypto::{DataKey, Secret};

impl Provider for AwsKmsProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::AwsKms
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Generated {
        self.run(self.generate(context))?
    }

    fn makes_many_at_once(&self) -> bool {
        true
    }

    /// All requests are under way at the same time, and this thread alone waits for them.
    fn generate_data_keys(&self, contexts: &[EncryptionContext], each: &mut dyn FnMut(usize, Generated)) {
        let each = RefCell::new(each);
        let calls = contexts.iter().enumerate().map(async |(place, context)| {
            let answer = self.generate(context).await;
            // Before any other call goes on, so that what is noted of this thread's last request is of this one.
            each.borrow_mut()(place, answer);
        });
        if let Err(error) = self.run(join_all(calls)) {
            (0..contexts.len()).for_each(|place| each.borrow_mut()(place, Err(error.clone())));
        }
    }

    fn generate_wrapped_key(&self, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        type Answer = Result<GenerateDataKeyWithoutPlaintextOutput, SdkError<GenerateDataKeyWithoutPlaintextError>>;
        let call = Call { operation: "GenerateDataKeyWithoutPlaintext", key: &self.key };
        let answer = self.call(&call, async |client| -> Answer {
            let request = client.generate_data_key_without_plaintext().key_id(&self.key).key_spec(DataKeySpec::Aes256);
            request.set_encryption_context(Some(pairs(context))).send().await
        })?;
        call.wrapped_key(answer.key_id, answer.ciphertext_blob)
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        check_key(key_id)?;
        let call = Call { operation: "Decrypt", key: key_id };
        call.check_wrapped(wrapped)?;
        let answer = self.call(&call, async |client| -> Result<DecryptOutput, SdkError<DecryptError>> {
            let request = client.decrypt().key_id(key_id).ciphertext_blob(Blob::new(wrapped));
            request.set_encryption_context(Some(pairs(context))).send().await
        })?;
        let data_key = call.data_key(answer.plaintext)?;
        call.key_id(answer.key_id)?;
        Ok(data_key)
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        check_key(key_id)?;
        let call = Call { operation: "Encrypt", key: key_id };
        let answer = self.call(&call, async |client| -> Result<EncryptOutput, SdkError<EncryptError>> {
            let request = client.encrypt().key_id(key_id).plaintext(Blob::new(data_key.expose().as_slice()));
            request.set_encryption_context(Some(pairs(context))).send().await
        })?;
        call.wrapped_key(answer.key_id, answer.ciphertext_blob)
    }

    /// Inside of KMS where both keys are in one Region; ReEncrypt does not reach another one, so there the data key
    /// passes through this process.
    fn rewrap(
        &self,
        from: &str,
        wrapped: &[u8],
        to: &str,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, ProviderError> {
        check_key(from)?;
        check_key(to)?;
        if self.region_in_use(from)? != self.region_in_use(to)? {
            return self.wrap(to, &self.unwrap(from, wrapped, context)?, context);
        }
        let [source, destination] = [from, to].map(|key| Call { operation: "ReEncrypt", key });
        source.check_wrapped(wrapped)?;
        let answer = self.call(&source, async |client| -> Result<ReEncryptOutput, SdkError<ReEncryptError>> {
            let request = client.re_encrypt().ciphertext_blob(Blob::new(wrapped));
            let request = request.source_key_id(from).set_source_encryption_context(Some(pairs(context)));
            let request = request.destination_key_id(to).set_destination_encryption_context(Some(pairs(context)));
            request.send().await
        })?;
        source.key_id(answer.source_key_id)?;
        destination.wrapped_key(answer.key_id, answer.ciphertext_blob)
    }

    fn leave_pace_to_caller(&self) {
        self.clients.leave_pace_to_caller();
    }

    fn hang_up(&self) {
        self.clients.hang_up();
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        check_key(key_id)?;
        aws_describe::describe(self, key_id)
    }
}

impl AwsKmsProvider {
    async fn generate(&self, context: &EncryptionContext) -> Generated {
        let call = Call { operation: "GenerateDataKey", key: &self.key };
        let send = async |client: &Client| -> Result<GenerateDataKeyOutput, SdkError<GenerateDataKeyError>> {
            let request = client.generate_data_key().key_id(&self.key).key_spec(DataKeySpec::Aes256);
            request.set_encryption_context(Some(pairs(context))).send().await
        };
        let answer = self.send_in_time(&call, send).await?;
        let data_key = call.data_key(answer.plaintext)?;
        Ok((data_key, call.wrapped_key(answer.key_id, answer.ciphertext_blob)?))
    }

    /// The Region in which `key` is looked for. Asks nobody but the SDK.
    fn region_in_use(&self, key: &str) -> Result<Option<String>, ProviderError> {
        if let Some(region) = self.clients.region(key) {
            return Ok(Some(region));
        }
        let call = Call { operation: "ReEncrypt", key };
        self.call(&call, async |client| -> Result<_, SdkError<ReEncryptError>> {
            Ok(Unasked(client.config().region().map(ToString::to_string)))
        })
        .map(|found| found.0)
    }
}

/// What the SDK knows without a request.
struct Unasked<T>(T);

impl<T> RequestId for Unasked<T> {
    fn request_id(&self) -> Option<&str> {
        None
    }
}

fn pairs(context: &EncryptionContext) -> HashMap<String, String> {
    context.pairs().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

impl Call<'_> {
    /// The data key in an answer. Wipes the answer's copy.
    fn data_key(&self, plaintext: Option<Blob>) -> Result<DataKey, ProviderError> {
        let bytes = Zeroizing::new(plaintext.map(Blob::into_inner).unwrap_or_default());
        let wrong = || self.bad_answer(&format!("it holds a data key of {} bytes, not 32", bytes.len()));
        let key: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| wrong())?;
        Secret::fill_with(|secret| {
            secret.copy_from_slice(key);
            Ok(())
        })
    }

    /// The wrapped key in an answer, if the key that was asked for wrapped it.
    fn wrapped_key(&self, key_id: Option<String>, bytes: Option<Blob>) -> Result<WrappedKey, ProviderError> {
        let key_id = self.key_id(key_id)?;
        let bytes = bytes.map(Blob::into_inner).unwrap_or_default();
        if bytes.is_empty() || bytes.len() > MAX_WRAPPED_LEN {
            return Err(self.bad_answer(&format!("it holds a wrapped key of {} bytes", bytes.len())));
        }
        Ok(WrappedKey { key_id, bytes })
    }

    /// KMS need not be asked about what it cannot have made.
    fn check_wrapped(&self, wrapped: &[u8]) -> Result<(), ProviderError> {
        if wrapped.is_empty() || wrapped.len() > MAX_WRAPPED_LEN {
            let message = format!("no wrapped key has {} bytes", wrapped.len());
            return Err(self.error(ProviderErrorKind::Tampered, &message));
        }
        Ok(())
    }
}
