//! Small files that end in a MAC.

/// The length of a MAC.
pub const MAC_LEN: usize = 32;

/// A parsed file: what it says, the bytes that its MAC covers, and the MAC. Parsed is not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed<'f, T> {
    /// What it says.
    pub content: T,
    /// What the MAC covers.
    pub signed: &'f [u8],
    /// The MAC.
    pub mac: [u8; MAC_LEN],
}

/// The file of `signed` with its MAC.
#[must_use]
pub fn seal(mut signed: Vec<u8>, mac: &[u8; MAC_LEN]) -> Vec<u8> {
    signed.extend_from_slice(mac);
    signed
}
