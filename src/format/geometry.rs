//! All offset arithmetic: where a plain byte lives on disk, and which plain size a disk size stands for.
//!
//! Two coordinate systems that never mix: [`PlainOffset`] counts bytes of the file as an application sees it, a
//! [`DiskOffset`] counts bytes of the ciphertext file. `docs/FORMAT.md` section 2.

use std::ops::RangeInclusive;

/// Bytes of a page on disk, and of the header page before the first one.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of plaintext in a page.
pub const PAYLOAD: u64 = 4048;
/// [`PAGE_SIZE`] for buffers.
pub const PAGE_LEN: usize = 4096;
/// [`PAYLOAD`] for buffers.
pub const PAYLOAD_LEN: usize = 4048;
/// The largest plain size: the largest whose disk size any backing filesystem can express.
pub const MAX_PLAIN_SIZE: u64 = (i64::MAX as u64 / PAGE_SIZE - 2) * PAYLOAD;

/// A position in the plaintext of a file, or a plaintext size, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PlainOffset(pub u64);

/// A position in a ciphertext file, or its size, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DiskOffset(pub u64);

/// The number of a page, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageIndex(pub u64);

impl PlainOffset {
    /// The page that holds this byte.
    #[must_use]
    pub fn page(self) -> PageIndex {
        PageIndex(self.0 / PAYLOAD)
    }

    /// Where in the page's payload this byte lies.
    #[must_use]
    pub fn in_page(self) -> usize {
        usize::try_from(self.0 % PAYLOAD).unwrap_or(0)
    }
}

impl PageIndex {
    /// Where the page begins on disk.
    #[must_use]
    pub fn disk(self) -> DiskOffset {
        DiskOffset(PAGE_SIZE * (1 + self.0))
    }

    /// The first plain byte of the page.
    #[must_use]
    pub fn start(self) -> PlainOffset {
        PlainOffset(PAYLOAD * self.0)
    }

    /// The first plain byte after the page.
    #[must_use]
    pub fn end(self) -> PlainOffset {
        PlainOffset(PAYLOAD * (self.0 + 1))
    }
}

impl DiskOffset {
    /// The page that lies at this place of a file, or `first` where the header does.
    #[must_use]
    pub fn page_from(self, first: PageIndex) -> PageIndex {
        PageIndex((self.0 / PAGE_SIZE).saturating_sub(1).min(MAX_PLAIN_SIZE / PAYLOAD)).max(first)
    }
}

/// The plain size of a file as its disk size tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeHint {
    /// The disk size carries the plain size (or there are no pages): nothing to read.
    Known(PlainOffset),
    /// A whole number of pages, the last of which says in its trailer how much of it counts.
    AskLastPage(PageIndex),
}

/// A disk size that no plain size maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes on disk are the size of no file: it was cut or grown by something else")]
pub struct ImpossibleSize(pub u64);

/// The plain size that `disk` stands for.
///
/// # Errors
/// [`ImpossibleSize`].
pub fn size_hint(disk: DiskOffset) -> Result<SizeHint, ImpossibleSize> {
    if disk.0 == 0 || disk.0 == PAGE_SIZE {
        return Ok(SizeHint::Known(PlainOffset(0)));
    }
    let impossible = Err(ImpossibleSize(disk.0));
    let (whole, rest) = (disk.0 / PAGE_SIZE, disk.0 % PAGE_SIZE);
    let most = settled_size(PlainOffset(MAX_PLAIN_SIZE)).0 / PAGE_SIZE;
    if !(2..=most).contains(&whole) || rest >= PAYLOAD {
        return impossible;
    }
    let pages = whole - 1;
    if rest == 0 {
        return Ok(SizeHint::AskLastPage(PageIndex(pages - 1)));
    }
    Ok(SizeHint::Known(PlainOffset((pages - 1) * PAYLOAD + rest)))
}

/// The plain size of a file whose last page is `last` with `len` bytes in it.
#[must_use]
pub fn size_with_last_page(last: PageIndex, len: usize) -> PlainOffset {
    PlainOffset(last.start().0 + len as u64)
}

/// How many pages hold `size` plain bytes.
#[must_use]
pub fn page_count(size: PlainOffset) -> u64 {
    size.0.div_ceil(PAYLOAD)
}

/// The last page of a file of `size` plain bytes; none if it is empty.
#[must_use]
pub fn last_page(size: PlainOffset) -> Option<PageIndex> {
    page_count(size).checked_sub(1).map(PageIndex)
}

/// How many bytes of the last page count, 1 to [`PAYLOAD`]; 0 if the file is empty.
#[must_use]
pub fn last_page_len(size: PlainOffset) -> usize {
    last_page(size).map_or(0, |last| usize::try_from(size.0 - last.start().0).unwrap_or(0))
}

/// The disk size of `size` plain bytes that says so by itself: header, pages, and the remainder as a sparse tail.
#[must_use]
pub fn settled_size(size: PlainOffset) -> DiskOffset {
    DiskOffset(aligned_size(size).0 + size.0 % PAYLOAD)
}

/// The disk size of `size` plain bytes without the tail: header and whole pages.
#[must_use]
pub fn aligned_size(size: PlainOffset) -> DiskOffset {
    DiskOffset(PAGE_SIZE * (1 + page_count(size)))
}

/// The pages that hold the `len` bytes at `offset`; none if `len` is 0 or the range ends past [`MAX_PLAIN_SIZE`].
#[must_use]
pub fn pages_of(offset: PlainOffset, len: u64) -> Option<RangeInclusive<u64>> {
    let last = offset.0.checked_add(len.checked_sub(1)?)?;
    (last < MAX_PLAIN_SIZE).then(|| offset.page().0..=PlainOffset(last).page().0)
}

/// The plain length behind `len` bytes of unpadded base64 that hold `overhead` bytes besides.
#[must_use]
pub fn plain_len_of_base64(len: u64, overhead: usize) -> u64 {
    (len * 3 / 4).saturating_sub(overhead as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_at_the_edges() {
        for (plain, settled) in [(0, 4096), (1, 8193), (4047, 8192 + 4047), (4048, 8192), (4049, 12289), (8096, 12288)]
        {
            assert_eq!(settled_size(PlainOffset(plain)), DiskOffset(settled), "{plain}");
        }
        // The tail of the largest sizes lies past the largest aligned one.
        for plain in [MAX_PLAIN_SIZE - 4047, MAX_PLAIN_SIZE - 1] {
            let plain = PlainOffset(plain);
            assert_eq!(size_hint(settled_size(plain)), Ok(SizeHint::Known(plain)));
        }
        assert_eq!(size_hint(DiskOffset(0)), Ok(SizeHint::Known(PlainOffset(0))));
        assert_eq!(size_hint(DiskOffset(8192)), Ok(SizeHint::AskLastPage(PageIndex(0))));
        let too_large = settled_size(PlainOffset(MAX_PLAIN_SIZE)).0 + PAGE_SIZE;
        for bad in [1, 4095, 4097, 8191, 8192 + 4048, 8192 + 4095, too_large, too_large + 1, u64::MAX] {
            assert_eq!(size_hint(DiskOffset(bad)), Err(ImpossibleSize(bad)), "{bad}");
        }
    }

    #[test]
    fn page_ranges_at_the_edges() {
        assert_eq!(pages_of(PlainOffset(0), 0), None);
        assert_eq!(pages_of(PlainOffset(0), 4048), Some(0..=0));
        assert_eq!(pages_of(PlainOffset(4047), 2), Some(0..=1));
        assert_eq!(pages_of(PlainOffset(MAX_PLAIN_SIZE), 1), None);
        assert_eq!(pages_of(PlainOffset(u64::MAX), 2), None);
    }

    proptest! {
        #[test]
        fn a_settled_size_tells_the_plain_size(size in 0..=MAX_PLAIN_SIZE) {
            let size = PlainOffset(size);
            let told = match size_hint(settled_size(size)).unwrap() {
                SizeHint::Known(told) => told,
                SizeHint::AskLastPage(last) => size_with_last_page(last, PAYLOAD_LEN),
            };
            prop_assert_eq!(told, size);
        }

        #[test]
        fn an_aligned_size_and_the_last_length_tell_the_plain_size(size in 1..=MAX_PLAIN_SIZE) {
            let size = PlainOffset(size);
            let SizeHint::AskLastPage(last) = size_hint(aligned_size(size)).unwrap() else { panic!("unsettled") };
            prop_assert_eq!(size_with_last_page(last, last_page_len(size)), size);
        }

        #[test]
        fn any_disk_size_is_one_plain_size_or_none(disk: u64) {
            if let Ok(SizeHint::Known(size)) = size_hint(DiskOffset(disk)) {
                prop_assert!(disk == 0 || settled_size(size) == DiskOffset(disk));
            }
        }
    }
}
