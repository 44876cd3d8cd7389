//! What the operations of AWS KMS on data keys are asked and answer, in their JSON.

use aws_sdk_kms::operation::RequestId;
use aws_sdk_kms::operation::decrypt::DecryptOutput;
use aws_sdk_kms::operation::generate_data_key::GenerateDataKeyOutput;
use aws_sdk_kms::primitives::Blob;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize, Serializer};

use super::super::EncryptionContext;

/// What GenerateDataKey and Decrypt are asked.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Input<'a> {
    pub(super) key_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) key_spec: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "base64")]
    pub(super) ciphertext_blob: Option<&'a [u8]>,
    #[serde(serialize_with = "pairs")]
    pub(super) encryption_context: &'a EncryptionContext,
}

fn base64<S: Serializer>(bytes: &Option<&[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(bytes.unwrap_or_default()))
}

fn pairs<S: Serializer>(context: &EncryptionContext, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(context.pairs())
}

/// What they answer.
pub(super) struct Answer {
    pub(super) key_id: Option<String>,
    pub(super) plaintext: Option<Blob>,
    pub(super) ciphertext_blob: Option<Blob>,
    request_id: Option<String>,
}

/// As it is sent: without escapes, which its fields do not need.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Sent<'a> {
    #[serde(borrow)]
    key_id: Option<&'a str>,
    plaintext: Option<&'a str>,
    ciphertext_blob: Option<&'a str>,
}

impl Answer {
    /// What a response with a whole body says, if it is plainly a success.
    pub(super) fn of_response(response: &HttpResponse) -> Option<Self> {
        if response.status().as_u16() != 200 {
            return None;
        }
        let sent: Sent<'_> = serde_json::from_slice(response.body().bytes()?).ok()?;
        let blob = |text: Option<&str>| text.map(|text| BASE64.decode(text).map(Blob::new)).transpose().ok();
        Some(Self {
            key_id: sent.key_id.map(str::to_owned),
            plaintext: blob(sent.plaintext)?,
            ciphertext_blob: blob(sent.ciphertext_blob)?,
            request_id: response.request_id().map(str::to_owned),
        })
    }
}

impl RequestId for Answer {
    fn request_id(&self) -> Option<&str> {
        self.request_id.as_deref()
    }
}

impl From<DecryptOutput> for Answer {
    fn from(output: DecryptOutput) -> Self {
        let request_id = output.request_id().map(str::to_owned);
        Self { key_id: output.key_id, plaintext: output.plaintext, ciphertext_blob: None, request_id }
    }
}

impl From<GenerateDataKeyOutput> for Answer {
    fn from(output: GenerateDataKeyOutput) -> Self {
        let request_id = output.request_id().map(str::to_owned);
        let GenerateDataKeyOutput { key_id, plaintext, ciphertext_blob, .. } = output;
        Self { key_id, plaintext, ciphertext_blob, request_id }
    }
}
