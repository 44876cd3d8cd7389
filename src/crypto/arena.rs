//! Memory for secrets: fixed slots in chunks that the kernel keeps out of swap and core files, and where it can out of the
//! sight of everybody else, itself included.
//!
//! Invariants:
//! * a free slot holds zeros: it is wiped when it is given back;
//! * before and after each chunk lies a page that cannot be touched, so that no overrun of other memory reaches a key;
//! * chunks are never given back, so a slot's address stays valid; there are only as many as keys were needed at a time;
//! * a child process has none of this memory: it does not find zeros in the place of keys, it ends if it looks for them.
#![allow(unsafe_code)] // memory from the kernel, and the slots in it, have no safe form

use std::alloc::{Layout, handle_alloc_error};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use zeroize::Zeroize as _;

/// How well the memory is protected that holds secrets; the best comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeyMemory {
    /// `memfd_secret`: never swapped, in no core file, and not in the kernel's own map of memory, so that neither root nor
    /// most faults of the kernel can read it.
    #[default]
    Secret,
    /// `mlock`: never swapped, and in no core file.
    Locked,
    /// In no core file; may be swapped out.
    Ordinary,
}

impl KeyMemory {
    const ALL: [Self; 3] = [Self::Secret, Self::Locked, Self::Ordinary];

    /// The name for people and programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Secret => "secret",
            Self::Locked => "locked",
            Self::Ordinary => "ordinary",
        }
    }

    /// What holds the secrets of this process; the weakest, if there are several. [`Self::Secret`] if there was no secret
    /// yet.
    #[must_use]
    pub fn in_use() -> Self {
        Self::ALL[usize::from(WEAKEST.load(Ordering::Relaxed)).min(2)]
    }
}

/// The largest secret, in bytes.
const LARGEST: usize = 64;
/// Nearly every secret is a key of 32 bytes; the others are few.
static SMALL: Arena = Arena::new(32, 65536);
static LARGE: Arena = Arena::new(LARGEST, 4096);
/// The weakest [`KeyMemory`] that was ever given out, as its place in [`KeyMemory::ALL`].
static WEAKEST: AtomicU8 = AtomicU8::new(0);

/// `N` bytes, from 1 to [`LARGEST`], in an arena. Wiped on drop.
pub(super) struct Slot<const N: usize>(Address);

/// The begin of a slot. Whoever has it, has the slot: there is never a second one.
struct Address(NonNull<u8>);

// SAFETY: a slot belongs to whoever has its address, and its memory is bound to no thread.
unsafe impl Send for Address {}
// SAFETY: through a shared reference the memory is only read.
unsafe impl Sync for Address {}

impl<const N: usize> Slot<N> {
    const ARENA: &'static Arena = {
        assert!(N > 0 && N <= LARGEST, "no slot is that large");
        if N <= 32 { &SMALL } else { &LARGE }
    };

    /// `N` zeros.
    pub(super) fn zeros() -> Self {
        Self(Self::ARENA.take())
    }

    pub(super) fn bytes(&self) -> &[u8; N] {
        // SAFETY: the slot is ours alone, is at least N bytes long, and was initialised with zeros.
        unsafe { self.0.0.cast().as_ref() }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { self.0.0.cast().as_mut() }
    }
}

impl<const N: usize> Drop for Slot<N> {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        Self::ARENA.give_back(Address(self.0.0));
    }
}

/// Slots of one size.
struct Arena {
    slot_len: usize,
    chunk_len: usize,
    free: Mutex<Free>,
}

struct Free {
    slots: Vec<Address>,
    /// Free or not.
    all: usize,
}

impl Arena {
    const fn new(slot_len: usize, chunk_len: usize) -> Self {
        Self { slot_len, chunk_len, free: Mutex::new(Free { slots: Vec::new(), all: 0 }) }
    }

    fn take(&self) -> Address {
        let mut free = self.free();
        if let Some(slot) = free.slots.pop() {
            return slot;
        }
        self.grow(&mut free)
    }

    fn give_back(&self, slot: Address) {
        // There is room for every slot, so this allocates nothing.
        self.free().slots.push(slot);
    }

    /// Adds a chunk and returns the first of its slots. Ends the process if there is no memory, as every allocation does.
    #[cold]
    fn grow(&self, free: &mut Free) -> Address {
        let len = self.chunk_len.next_multiple_of(page_len());
        let mapped = KeyMemory::ALL.into_iter().find_map(|kind| Some((map(len, kind)?, kind)));
        let Some((chunk, kind)) = mapped else {
            handle_alloc_error(Layout::from_size_align(len, self.slot_len).unwrap_or(Layout::new::<[u8; LARGEST]>()));
        };
        WEAKEST.fetch_max(kind as u8, Ordering::Relaxed);
        let slots = len / self.slot_len;
        free.all += slots;
        free.slots.reserve_exact(free.all);
        // SAFETY: all these places lie within the chunk, and no two slots overlap.
        free.slots.extend((1..slots).rev().map(|slot| Address(unsafe { chunk.add(slot * self.slot_len) })));
        Address(chunk)
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn page_len() -> usize {
    // SAFETY: this only asks.
    let len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(len).ok().filter(|len| len.is_power_of_two()).unwrap_or(65536)
}

/// `len` bytes of zeros, whole pages, with a page before and after them that cannot be touched. `None` if the kernel does
/// not give this kind.
fn map(len: usize, kind: KeyMemory) -> Option<NonNull<u8>> {
    let (page, nowhere) = (page_len(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    let whole = len.checked_add(2 * page)?;
    // SAFETY: a new mapping at a place of the kernel's choice.
    let reserved = unsafe { libc::mmap(ptr::null_mut(), whole, libc::PROT_NONE, nowhere, -1, 0) };
    if reserved == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the reserved range is longer than a page.
    let chunk = unsafe { reserved.byte_add(page) };
    let given = match kind {
        KeyMemory::Secret => make_secret(chunk, len),
        KeyMemory::Locked => make_ordinary(chunk, len) && lock(chunk, len),
        KeyMemory::Ordinary => make_ordinary(chunk, len),
    };
    if !given {
        // SAFETY: this range was mapped above, and nothing points into it.
        unsafe { libc::munmap(reserved, whole) };
        return None;
    }
    // What a kernel refuses of this is forbidden elsewhere too: the process makes no core files, and a child of it becomes
    // another program at once.
    for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
        // SAFETY: this range is mapped and ours; neither advice changes what it holds for this process.
        unsafe { libc::madvise(chunk, len, advice) };
    }
    // SAFETY: this range is mapped writable. It touches every page now, so that none is missing later.
    unsafe { ptr::write_bytes(chunk.cast::<u8>(), 0, len) };
    NonNull::new(chunk.cast())
}

/// Puts memory that only this process can see in the place of a part of a reserved range.
fn make_secret(chunk: *mut libc::c_void, len: usize) -> bool {
    let Ok(length) = libc::off_t::try_from(len) else { return false };
    // SAFETY: the call takes flags and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let Ok(fd @ 0..) = libc::c_int::try_from(fd) else { return false };
    // SAFETY: the descriptor is ours. The range at `chunk` was reserved by the caller, so replacing it harms nothing.
    unsafe {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        let mapped =
            libc::ftruncate(fd, length) == 0 && libc::mmap(chunk, len, access, flags, fd, 0) != libc::MAP_FAILED;
        // The mapping stays, and nothing else may reach it.
        libc::close(fd);
        mapped
    }
}

fn make_ordinary(chunk: *mut libc::c_void, len: usize) -> bool {
    // SAFETY: a part of a range that the caller has reserved.
    unsafe { libc::mprotect(chunk, len, libc::PROT_READ | libc::PROT_WRITE) == 0 }
}

fn lock(chunk: *mut libc::c_void, len: usize) -> bool {
    // SAFETY: this range is mapped, and locking it changes nothing that it holds.
    unsafe { libc::mlock(chunk, len) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The line of `smaps` that begins with `field`, of the mapping that begins at `address`.
    fn smaps(address: NonNull<u8>, field: &str) -> String {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", address.as_ptr().addr());
        let mapping = text.lines().skip_while(|line| !line.starts_with(&begin));
        mapping.take(40).find(|line| line.starts_with(field)).expect("a field").to_owned()
    }

    /// Every kind that this kernel gives can be written, is not dumped, does not reach children, and has guards.
    #[test]
    fn chunks_are_what_they_are_called() {
        let mut given = 0;
        for kind in KeyMemory::ALL {
            let Some(chunk) = map(65536, kind) else { continue };
            given += 1;
            // SAFETY: the chunk was mapped with this length.
            let bytes = unsafe { std::slice::from_raw_parts_mut(chunk.as_ptr(), 65536) };
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(1);
            let flags = smaps(chunk, "VmFlags:");
            let has = |flag: &str| flags.split(' ').any(|word| word == flag);
            assert!(has("dd") && has("dc"), "{kind:?}: {flags}");
            assert_eq!(has("lo"), kind != KeyMemory::Ordinary, "{kind:?}: {flags}");
            let whole = std::fs::read_to_string("/proc/self/maps").unwrap();
            let (begin, end) = (chunk.as_ptr().addr(), chunk.as_ptr().addr() + 65536);
            let guards = whole.lines().filter(|line| line.contains(" ---p "));
            let guards: Vec<&str> = guards.map(|line| line.split(' ').next().unwrap()).collect();
            assert!(guards.iter().any(|range| range.ends_with(&format!("-{begin:x}"))), "{whole}");
            assert!(guards.iter().any(|range| range.starts_with(&format!("{end:x}-"))), "{whole}");
        }
        assert!(given >= 2, "a kernel without locked memory");
    }

    #[test]
    fn no_slot_is_given_twice_and_none_is_lost() {
        // An arena of this test's own: nobody else takes what it gives back.
        static OWN: Arena = Arena::new(32, 4096);
        let taken: Vec<Address> = (0..1000).map(|_| OWN.take()).collect();
        let begins: HashSet<usize> = taken.iter().map(|slot| slot.0.as_ptr().addr()).collect();
        assert_eq!(begins.len(), 1000);
        assert!(begins.iter().all(|begin| begin % 32 == 0));
        let all = OWN.free().all;
        taken.into_iter().for_each(|slot| OWN.give_back(slot));
        let free = OWN.free();
        assert_eq!((free.all, free.slots.len()), (all, all));
        assert!(free.slots.capacity() >= all);
    }

    #[test]
    fn dropped_secrets_are_wiped() {
        let mut slot = Slot::<61>::zeros();
        slot.bytes_mut().fill(0xa5);
        let address = slot.0.0.cast::<[u8; 61]>();
        // SAFETY: chunks are never unmapped.
        let now = || unsafe { ptr::read_volatile(address.as_ptr()) };
        assert_eq!(now(), [0xa5; 61]);
        drop(slot);
        // The slot may be another test's by now, but it holds nothing of this one.
        assert!(now().iter().filter(|byte| **byte == 0xa5).count() < 10);
    }

    #[test]
    fn many_threads_share_it() {
        std::thread::scope(|scope| {
            for thread in 1..=4_u8 {
                scope.spawn(move || {
                    for round in 0..200 {
                        let mut slots: Vec<Slot<32>> = (0..50).map(|_| Slot::zeros()).collect();
                        slots.iter_mut().for_each(|slot| {
                            assert_eq!(*slot.bytes(), [0; 32], "round {round}");
                            slot.bytes_mut().fill(thread);
                        });
                        assert!(slots.iter().all(|slot| *slot.bytes() == [thread; 32]));
                    }
                });
            }
        });
        assert!(KeyMemory::in_use() < KeyMemory::Ordinary, "the tests run with a limit of locked memory");
    }
}
