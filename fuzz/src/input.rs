//! Choices out of a fuzzer's bytes. What has ended goes on as zeros, so that every input means something.

/// What is left of an input.
pub struct Input<'d>(&'d [u8]);

impl<'d> Input<'d> {
    /// All of it.
    pub fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len` bytes.
    pub fn take(&mut self, len: usize) -> &'d [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'d [u8] {
        std::mem::take(&mut self.0)
    }

    /// Exactly `N` bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.take(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Whether the next byte is odd.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(u16::from_le_bytes(self.array())) % end
    }

    /// A number of 64 bits.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Bytes whose number comes before them: at most `most`.
    pub fn field(&mut self, most: usize) -> &'d [u8] {
        let len = self.below(most + 1);
        self.take(len)
    }

    /// Changes some bytes, or none: pairs of a place and of what is flipped there. Returns whether anything changed.
    pub fn damage(&mut self, bytes: &mut [u8]) -> bool {
        let before = bytes.to_vec();
        for _ in 0..self.below(4) {
            let (at, mask) = (self.below(bytes.len().max(1)), self.byte());
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
        before != bytes
    }
}
