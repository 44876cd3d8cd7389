//! stub
/// stub
pub struct CipherDirectory;
