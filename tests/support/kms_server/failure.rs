//! Failures as KMS names them.

use serde_json::Value;

/// A failure as KMS names it.
pub(super) struct Failure {
    pub(super) status: u16,
    pub(super) code: &'static str,
    pub(super) message: String,
}

/// What an operation answers.
pub(super) type Outcome = Result<Value, Failure>;

pub(super) fn failure(code: &'static str, message: impl Into<String>) -> Failure {
    let status = match code {
        "DryRunOperationException" => 412,
        "KMSInternalException" => 500,
        _ => 400,
    };
    Failure { status, code, message: message.into() }
}

pub(super) fn invalid(message: impl Into<String>) -> Failure {
    failure("ValidationException", message)
}
