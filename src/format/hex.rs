//! Ids as people read them.

/// Lower-case hexadecimal.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    ::hex::encode(bytes)
}

/// The `N` bytes that `text` writes in lower-case hexadecimal.
#[must_use]
pub fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let is_upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
    (!is_upper && ::hex::decode_to_slice(text, &mut bytes).is_ok()).then_some(bytes)
}

/// 16 bytes in the groups of a UUID.
#[must_use]
pub fn encode_uuid(id: &[u8; 16]) -> String {
    let text = encode(id);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

/// The 16 bytes of a lower-case UUID.
#[must_use]
pub fn decode_uuid(text: &str) -> Option<[u8; 16]> {
    let id = decode(&text.replace('-', ""))?;
    (encode_uuid(&id) == text).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_and_refuses() {
        assert_eq!(encode(&[0, 0xab, 0xff]), "00abff");
        assert_eq!(decode::<3>("00abff"), Some([0, 0xab, 0xff]));
        for bad in ["", "00abf", "00abfg", "00ABFF", "00abff00", "+0abff", "00abf\u{e9}"] {
            assert_eq!(decode::<3>(bad), None);
        }
        let id: [u8; 16] = std::array::from_fn(|i| u8::try_from(i * 17).unwrap());
        assert_eq!(encode_uuid(&id), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(decode_uuid(&encode_uuid(&id)), Some(id));
        assert_eq!(decode_uuid("0011-22334455-6677-8899-aabbccddeeff"), None);
    }
}
