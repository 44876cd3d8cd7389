//! Logs from their beginning to their end.

use super::*;
use crate::crypto::{AuditKey, Secret, Suite, VolumeKeys};
use crate::keys::{Behalf, KeyUse, Operation, ProviderKind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn key() -> Arc<AuditKey> {
    Arc::new(VolumeKeys::derive(&Secret::random(), &[1; 16], Suite::Xaes256Gcm).audit)
}

fn a_use(n: usize) -> KeyUse {
    KeyUse {
        at: SystemTime::now(),
        took: Duration::from_millis(3),
        operation: Operation::Unwrap,
        provider: ProviderKind::AwsKms,
        wrapping_key: format!("arn:{n}"),
        data_key: Some("d".to_owned()),
        behalf: Behalf::default(),
        request_id: None,
        outcome: Ok(()),
    }
}

fn begun(path: &Path, key: &Arc<AuditKey>, required: bool, most: Option<u64>) -> AuditTrail {
    let trail = AuditTrail::new(required);
    trail.uses().note(a_use(0)).unwrap();
    trail.begin(LogFile::open(path, most).unwrap(), Arc::clone(key), "v").unwrap();
    trail
}

#[test]
fn what_was_noted_before_and_after_the_beginning_is_there_in_order() {
    let (home, key) = (tempfile::tempdir().unwrap(), key());
    let path = home.path().join("log");
    for required in [false, true] {
        let trail = begun(&path, &key, required, None);
        assert!(matches!(LogFile::open(&path, None), Err(FileError::InUse(_))));
        (1..100).for_each(|n| trail.uses().note(a_use(n)).unwrap());
        if required {
            assert_eq!((trail.status().waiting, trail.status().lost), (0, 0));
        }
        trail.end();
    }
    let report = verify(std::slice::from_ref(&path), Some(&key), &[]).unwrap().0;
    assert_eq!((report.records, report.uses, report.mounts, report.ended), (204, 200, 2, true));
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

#[test]
fn a_file_that_is_moved_away_or_too_long_is_followed_by_a_new_one() {
    let (home, key) = (tempfile::tempdir().unwrap(), key());
    let path = home.path().join("log");
    let trail = begun(&path, &key, true, Some(5_000));
    for n in 1..60 {
        trail.uses().note(a_use(n)).unwrap();
        if n == 5 {
            std::fs::rename(&path, home.path().join("moved")).unwrap();
        }
    }
    trail.end();
    let mut files: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 4, "{files:?}");
    files.reverse();
    let report = verify(&files, Some(&key), &[]).unwrap().0;
    assert!(report.faults.is_empty() && report.uses == 60, "{report:?}");
    let missing: Vec<_> = files.iter().filter(|file| !file.ends_with("moved")).cloned().collect();
    let report = verify(&missing, Some(&key), &[]).unwrap().0;
    assert!(report.first > 1 && report.faults.is_empty(), "the oldest may be gone: {report:?}");
}

#[test]
fn a_log_of_another_volume_or_with_a_changed_end_is_refused() {
    let (home, key) = (tempfile::tempdir().unwrap(), key());
    let path = home.path().join("log");
    begun(&path, &key, false, None).end();
    let trail = AuditTrail::new(false);
    let begin = |key: &Arc<AuditKey>| trail.begin(LogFile::open(&path, None).unwrap(), Arc::clone(key), "v");
    assert!(matches!(begin(&self::key()), Err(BeginError::OtherVolume(_))));
    std::fs::write(&path, "something\nelse\n").unwrap();
    assert!(matches!(LogFile::open(&path, None), Err(FileError::NotALog(_))));
}

#[test]
fn a_torn_end_is_told_by_the_next_line() {
    let (home, key) = (tempfile::tempdir().unwrap(), key());
    let path = home.path().join("log");
    begun(&path, &key, false, None).end();
    let whole = std::fs::read(&path).unwrap();
    let line = whole.split(|byte| *byte == b'\n').next().unwrap();
    std::fs::write(&path, [&whole[..], &line[..40]].concat()).unwrap();
    let report = verify(std::slice::from_ref(&path), Some(&key), &[]).unwrap().0;
    assert!(report.faults.is_empty() && report.torn_end == 40, "{report:?}");
    begun(&path, &key, false, None).end();
    let report = verify(std::slice::from_ref(&path), Some(&key), &[]).unwrap().0;
    assert!(report.faults.is_empty() && report.torn == 1 && report.torn_end == 0, "{report:?}");
}
