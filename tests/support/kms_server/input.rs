//! The fields of a request.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;

use super::failure::{Failure, failure, invalid};

/// The encryption context as associated data: names and values in the order of the names, each after its length in
/// 4 bytes.
pub(super) fn context(input: &Value, name: &str) -> Result<Vec<u8>, Failure> {
    let not_text = || failure("SerializationException", format!("{name} must map strings to strings"));
    let pairs = match input.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(pairs)) => pairs,
        Some(_) => return Err(not_text()),
    };
    let pairs = pairs.iter().map(|(name, value)| Ok((name.as_str(), value.as_str().ok_or_else(not_text)?)));
    let pairs: BTreeMap<_, _> = pairs.collect::<Result<_, Failure>>()?;
    let fields = pairs.into_iter().flat_map(|(name, value)| [name, value]);
    let prefixed = |field: &str| {
        let length = u32::try_from(field.len()).expect("a short request");
        [&length.to_be_bytes()[..], field.as_bytes()].concat()
    };
    Ok(fields.flat_map(prefixed).collect())
}

pub(super) fn check_dry_run(input: &Value) -> Result<(), Failure> {
    match flag(input, "DryRun") {
        true => Err(failure("DryRunOperationException", "The request would have succeeded.")),
        false => Ok(()),
    }
}

pub(super) fn bytes(input: &Value, name: &str, max: usize) -> Result<Vec<u8>, Failure> {
    let text = text(input, name).ok_or_else(|| invalid(format!("'{name}' must not be null")))?;
    let bytes = BASE64.decode(text).map_err(|error| failure("SerializationException", error.to_string()))?;
    match bytes.len() {
        length if (1..=max).contains(&length) => Ok(bytes),
        _ => Err(invalid(format!("'{name}' must have between 1 and {max} bytes"))),
    }
}

pub(super) fn text<'a>(input: &'a Value, name: &str) -> Option<&'a str> {
    input.get(name)?.as_str()
}

pub(super) fn flag(input: &Value, name: &str) -> bool {
    input.get(name).and_then(Value::as_bool).unwrap_or(false)
}
