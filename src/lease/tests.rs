//! Hosts that share a directory and no lock.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::crypto::{Secret, Suite, VolumeKeys};
use crate::format::lease::Lease;
use crate::storage::cipher_directory::LockMode;
use crate::storage::{CipherDirectory, Host};

use super::{Claim, LeaseError, Lost, Pace, Seal, Tenure};

const PACE: Pace = Pace {
    renew: Duration::from_millis(200),
    valid: Duration::from_millis(700),
    watch: Duration::from_millis(1500),
    settle: Duration::from_millis(100),
};

struct Shared {
    home: tempfile::TempDir,
    seal: Seal,
}

impl Shared {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        CipherDirectory::create(&home.path().join("c"), "config", "id").unwrap();
        Self { home, seal: seal([1; 16]) }
    }

    fn lease(&self) -> PathBuf {
        self.home.path().join("c/.kmsfs/lease")
    }

    /// What `host` does: another file of locks would not see it, so no lock is kept.
    fn claim(&self, host: &Host, local: bool) -> Claim {
        let directory = CipherDirectory::open(&self.home.path().join("c")).unwrap();
        let lock = directory.lock(LockMode::Exclusive).unwrap();
        Claim::with(lock.lease_file().unwrap(), self.seal.clone(), host.clone(), local, PACE)
    }

    fn take(&self, host: &Host) -> Result<Tenure, LeaseError> {
        self.claim(host, false).take(&mut |_| {}).map(Option::unwrap)
    }

    fn leave(&self, lease: &Lease) {
        fs::write(self.lease(), self.seal.bytes(lease)).unwrap();
    }

    fn found(&self) -> Option<Lease> {
        self.seal.open(&fs::read(self.lease()).unwrap())
    }
}

fn seal(volume_id: [u8; 16]) -> Seal {
    Seal::new(volume_id, Arc::new(VolumeKeys::derive(&Secret::random(), &volume_id, Suite::Xaes256Gcm).lease))
}

fn host(name: &str) -> Host {
    let mut machine_id = [0; 16];
    machine_id[..name.len()].copy_from_slice(name.as_bytes());
    Host { machine_id, boot_id: machine_id, name: name.to_owned(), ..Host::of_process() }
}

fn took<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed())
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_lease_that_is_renewed_keeps_other_hosts_out_and_goes_with_its_holder() {
    let shared = Shared::new();
    let first = shared.take(&host("one")).unwrap();
    let mut told = Vec::new();
    let refused = shared.claim(&host("two"), false).take(&mut |why| told.push(why.to_owned()));
    let Err(LeaseError::Held(lease)) = refused else { panic!("two writers") };
    assert_eq!((lease.host.as_str(), lease.process), ("one", std::process::id()));
    assert!(told.len() == 1 && told[0].contains("process") && told[0].contains("on one"), "{told:?}");
    // A reader is refused too, and leaves nothing.
    let looked = shared.claim(&host("three"), false).wait_until_free(&mut |_| {});
    assert!(matches!(looked, Err(LeaseError::Held(_))));
    first.check().unwrap();
    drop(first);
    assert!(!shared.lease().exists());
    let (second, waited) = took(|| shared.take(&host("two")).unwrap());
    assert!(waited < PACE.watch, "{waited:?}");
    second.check().unwrap();
}

#[test]
fn a_lease_that_nobody_renews_is_taken_over_after_the_wait_and_fences_its_holder() {
    let shared = Shared::new();
    let frozen = Tenure::begin_frozen(shared.claim(&host("one"), false));
    let (second, waited) = took(|| shared.take(&host("two")).unwrap());
    assert!(waited >= PACE.watch, "{waited:?}");
    assert_eq!(frozen.check(), Err(Lost::ToAnother));
    second.check().unwrap();
    drop(frozen);
    assert_eq!(shared.found().unwrap().host, "two", "who has lost the lease leaves it alone");
}

#[test]
fn a_holder_that_wakes_up_goes_on_if_nobody_has_taken_over() {
    let shared = Shared::new();
    let frozen = Tenure::begin_frozen(shared.claim(&host("one"), false));
    let before = shared.found().unwrap().renewals;
    std::thread::sleep(PACE.valid + Duration::from_millis(50));
    frozen.check().unwrap();
    assert!(shared.found().unwrap().renewals > before, "it is renewed before anything is written");
}

#[test]
fn without_its_lease_renewed_a_holder_does_not_write() {
    let shared = Shared::new();
    let tenure = Tenure::begin_frozen(shared.claim(&host("one"), false));
    let (lease, aside) = (shared.lease(), shared.home.path().join("aside"));
    fs::rename(&lease, &aside).unwrap();
    fs::create_dir(&lease).unwrap();
    tenure.check().unwrap();
    std::thread::sleep(PACE.valid);
    assert_eq!(tenure.check(), Err(Lost::NotRenewed));
    fs::remove_dir(&lease).unwrap();
    fs::rename(&aside, &lease).unwrap();
    tenure.check().unwrap();
}

#[test]
fn what_has_certainly_ended_is_taken_over_at_once() {
    let shared = Shared::new();
    let me = Host { machine_id: [7; 16], ..Host::of_process() };
    let mine = shared.seal.begin(&me, false);
    let mut child = std::process::Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let dead = Lease { process: child.id(), ..mine.clone() };
    for left in [dead.clone(), Lease { start: 1, ..mine.clone() }, Lease { boot_id: [8; 16], ..mine.clone() }] {
        shared.leave(&left);
        let (taken, waited) = took(|| shared.take(&me).unwrap());
        assert!(waited < PACE.watch, "{waited:?}: {left:?}");
        drop(taken);
    }
    // A copy, as a backup, of a volume that is in use on a filesystem whose locks are those of this kernel.
    shared.leave(&Lease { local: true, ..shared.seal.begin(&host("other"), false) });
    let (taken, waited) = took(|| shared.claim(&me, true).take(&mut |_| {}).unwrap());
    assert!(waited < PACE.watch, "{waited:?}");
    drop(taken);
    // The holder reached it from elsewhere, so that the lock here says nothing.
    shared.leave(&shared.seal.begin(&host("other"), false));
    let (_taken, waited) = took(|| shared.claim(&me, true).take(&mut |_| {}).unwrap());
    assert!(waited >= PACE.watch, "{waited:?}");
}

#[test]
fn of_several_that_take_over_at_once_one_has_it() {
    let shared = Shared::new();
    for round in 0..3 {
        if round > 0 {
            shared.leave(&shared.seal.begin(&host("gone"), false));
        }
        let tenures: Vec<_> = std::thread::scope(|scope| {
            let claim = |name| shared.claim(&host(name), false);
            let claims = ["a", "b", "c"].map(claim).map(|claim| scope.spawn(|| claim.take(&mut |_| {})));
            claims.into_iter().map(|taken| taken.join().unwrap()).collect()
        });
        let held: Vec<_> = tenures.iter().flatten().flatten().collect();
        assert_eq!(held.len(), 1, "round {round}");
        held[0].check().unwrap();
    }
}

#[test]
fn nonsense_is_neither_believed_nor_in_the_way_for_good() {
    let shared = Shared::new();
    let foreign = Shared { home: tempfile::tempdir().unwrap(), seal: seal([1; 16]) };
    let other_volume = Seal::new([2; 16], Arc::clone(shared.seal.key()));
    let forged = foreign.seal.bytes(&foreign.seal.begin(&host("one"), true));
    let strange = other_volume.bytes(&other_volume.begin(&host("one"), true));
    for nonsense in [Vec::new(), vec![0; 4096], b"locked".to_vec(), forged, strange] {
        fs::write(shared.lease(), nonsense).unwrap();
        let (tenure, waited) = took(|| shared.take(&host("two")).unwrap());
        assert!(waited >= PACE.watch);
        drop(tenure);
    }
    // Put there under a mount, it is replaced, and nobody stops.
    let tenure = shared.take(&host("two")).unwrap();
    for spoil in [|path: &Path| fs::write(path, "nonsense"), |path: &Path| fs::remove_file(path)] {
        spoil(&shared.lease()).unwrap();
        wait_until("the lease comes back", || {
            fs::read(shared.lease())
                .is_ok_and(|bytes| shared.seal.open(&bytes).is_some_and(|lease| lease.host == "two"))
        });
        tenure.check().unwrap();
    }
}

#[test]
fn what_changes_and_is_no_lease_is_told_and_not_waited_for_for_ever() {
    let shared = Shared::new();
    let (path, stop) = (shared.lease(), std::sync::atomic::AtomicBool::new(false));
    fs::write(&path, "0").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                fs::write(&path, format!("{round}")).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let taken = shared.take(&host("two"));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(taken, Err(LeaseError::Nonsense)));
    });
}
