//! Sizes and offsets.

use kmsfs::format::geometry::{
    DiskOffset, MAX_PLAIN_SIZE, PAGE_SIZE, PAYLOAD, PAYLOAD_LEN, PlainOffset, SizeHint, aligned_size, last_page,
    last_page_len, page_count, pages_of, settled_size, size_hint, size_with_last_page,
};

use super::input::Input;

/// Bytes: four numbers, each near an edge or anywhere.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let disk = number(&mut input);
    any_disk_size(disk);
    any_plain_size(number(&mut input));
    any_range(number(&mut input), number(&mut input));
}

fn number(input: &mut Input<'_>) -> u64 {
    let (near, number) = (input.byte(), input.number());
    let edge = match near % 8 {
        0 => return number,
        1 => 0,
        2 => PAGE_SIZE * (number >> 40),
        3 => PAYLOAD * (number >> 40),
        4 => MAX_PLAIN_SIZE,
        5 => settled_size(PlainOffset(MAX_PLAIN_SIZE)).0,
        6 => i64::MAX as u64,
        _ => u64::MAX,
    };
    let step = number & 0xffff;
    if near & 0x80 == 0 { edge.wrapping_add(step) } else { edge.wrapping_sub(step) }
}

fn any_disk_size(disk: u64) {
    match size_hint(DiskOffset(disk)) {
        Ok(SizeHint::Known(size)) => {
            assert!(disk == 0 || settled_size(size) == DiskOffset(disk));
            assert!(size.0 <= MAX_PLAIN_SIZE);
        }
        Ok(SizeHint::AskLastPage(last)) => {
            assert_eq!(last.disk().0 + PAGE_SIZE, disk);
            for len in [1, 2, PAYLOAD_LEN - 1, PAYLOAD_LEN] {
                let size = size_with_last_page(last, len);
                assert_eq!((aligned_size(size).0, last_page(size), last_page_len(size)), (disk, Some(last), len));
                assert!(size.0 <= MAX_PLAIN_SIZE);
            }
        }
        Err(_) => {
            let too_large = disk >= settled_size(PlainOffset(MAX_PLAIN_SIZE)).0 + PAGE_SIZE;
            let no_page = !disk.is_multiple_of(PAGE_SIZE) && disk < 2 * PAGE_SIZE;
            assert!(too_large || no_page || disk % PAGE_SIZE >= PAYLOAD, "{disk} is the size of a file");
        }
    }
}

fn any_plain_size(size: u64) {
    if size > MAX_PLAIN_SIZE {
        return;
    }
    let plain = PlainOffset(size);
    let told = match size_hint(settled_size(plain)).expect("a size that a writer makes") {
        SizeHint::Known(told) => told,
        SizeHint::AskLastPage(last) => size_with_last_page(last, PAYLOAD_LEN),
    };
    assert_eq!(told, plain);
    assert!(settled_size(plain).0 <= i64::MAX as u64, "no filesystem has such a size");
    assert_eq!(page_count(plain), size.div_ceil(PAYLOAD));
    assert_eq!(plain.page().start().0 + plain.in_page() as u64, size);
    assert!(plain.page().end().0 > size && plain.page().disk().0 <= settled_size(plain).0);
}

fn any_range(offset: u64, len: u64) {
    let end = u128::from(offset) + u128::from(len);
    match pages_of(PlainOffset(offset), len) {
        Some(pages) => {
            assert!(len > 0 && end <= MAX_PLAIN_SIZE.into());
            assert_eq!((*pages.start(), *pages.end()), (offset / PAYLOAD, (offset + len - 1) / PAYLOAD));
        }
        None => assert!(len == 0 || end > MAX_PLAIN_SIZE.into(), "{len} at {offset} lie in pages"),
    }
}
