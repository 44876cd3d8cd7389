//! Real mounts whose KMS refuses, throttles, stalls, lies or goes away. For each fault: the errno of `open`, the line in the
//! log, how many calls were made, and that all is well again when the fault is over, without a remount. And what costs no
//! call at all.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::fault_proxy::{Fault, MESSAGE, REQUEST_ID};
use crate::support::kms_mount::{KmsVolume, LONGEST_OPEN, content, open_all};
use crate::support::{self, errno, eventually, walk};

const DECRYPT: &str = "Decrypt";

/// A fault; the errno of `open`, or none if it succeeds; what the log says; how many calls are made.
type Row = (Fault, Option<i32>, &'static str, RangeInclusive<u64>);

/// Each fault meets a file of its own. Of one mount's, no two have the same kind: the log is silent on the second.
fn faults(rows: &[Row]) {
    let scene = KmsVolume::new(&["--no-prefetch"]);
    let files = scene.files("f", rows.len(), 100);
    scene.make_cold();
    for ((fault, expected, log, calls), file) in rows.iter().zip(&files) {
        let (before, logged) = (scene.proxy.calls(DECRYPT), scene.volume.home.logs().len());
        scene.proxy.inject(DECRYPT, .., *fault);
        let started = Instant::now();
        assert_eq!(errno(File::open(file)), *expected, "{fault:?}");
        let took = started.elapsed();
        let made = scene.proxy.calls(DECRYPT) - before;
        scene.proxy.heal();
        let logs = scene.volume.home.logs();
        let said = &logs[logged..];
        println!("{fault:?}: errno {expected:?} after {took:?}, {made} calls: {said}");
        assert!(took < LONGEST_OPEN, "{fault:?}: {took:?}");
        assert!(calls.contains(&made), "{fault:?}: {made} calls, not {calls:?}");
        match expected {
            None => assert_eq!(said, "", "{fault:?}"),
            Some(_) => assert!(said.contains(log) && said.contains(" WARN "), "{fault:?}: {said}"),
        }
        if let Fault::Exception(_, code) = fault {
            for words in [code, MESSAGE, REQUEST_ID, "data key ", &scene.key.arn] {
                assert!(said.contains(words), "{fault:?}: {words} is not in {said}");
            }
        }
        if *expected != Some(libc::EIO) && expected.is_some() {
            let before = scene.proxy.calls(DECRYPT);
            assert_eq!(errno(File::open(file)), *expected, "{fault:?} is remembered");
            assert_eq!(scene.proxy.calls(DECRYPT), before, "{fault:?} is remembered");
        }
    }
    for (n, file) in files.iter().enumerate() {
        let fault = rows[n].0;
        eventually(&format!("it opens after {fault:?}"), || File::open(file).is_ok());
        assert!(fs::read(file).unwrap() == content(n, 100), "{fault:?}");
    }
}

fn exception(code: &'static str) -> Fault {
    Fault::Exception(400, code)
}

// The SDK makes four attempts at what may pass and one at what will be the same the next time; two with new credentials.

#[test]
fn faults_one() {
    faults(&[
        (Fault::Latency(Duration::from_millis(200)), None, "", 1..=1),
        (exception("AccessDeniedException"), Some(libc::EACCES), "kms:Decrypt in the key's policy", 1..=1),
        (exception("DisabledException"), Some(libc::EKEYREVOKED), "enable the key", 1..=1),
        (exception("NotFoundException"), Some(libc::ENOKEY), "check the key's id", 1..=1),
        (exception("ExpiredTokenException"), Some(libc::EKEYEXPIRED), "renew the AWS credentials", 2..=2),
        (Fault::Empty, Some(libc::EIO), "a data key of 0 bytes", 1..=1),
        (Fault::WrongKey, Some(libc::EIO), "commitment", 1..=1),
        (Fault::Stall, Some(libc::ETIMEDOUT), "check the network", 2..=4),
    ]);
}

#[test]
fn faults_two() {
    faults(&[
        (exception("KMSInvalidStateException"), Some(libc::EKEYREVOKED), "enable the key", 1..=1),
        (exception("IncorrectKeyException"), Some(libc::ENOKEY), "check the key's id", 1..=1),
        (Fault::TruncatedJson, Some(libc::EIO), "check what answers in the place of KMS", 1..=1),
        (Fault::Reset, Some(libc::ETIMEDOUT), "check the network", 4..=4),
    ]);
}

#[test]
fn faults_three() {
    faults(&[
        (Fault::Exception(500, "KeyUnavailableException"), Some(libc::EKEYREVOKED), "enable the key", 4..=4),
        (Fault::Gateway(500), Some(libc::ETIMEDOUT), "an answer with status 500", 4..=4),
        // Tried for five seconds, more and more slowly.
        (exception("ThrottlingException"), Some(libc::ETIMEDOUT), "check the account's KMS quota", 5..=40),
    ]);
}

#[test]
fn faults_four() {
    faults(&[(Fault::Gateway(503), Some(libc::ETIMEDOUT), "an answer with status 503", 4..=4)]);
}

/// The greatest age of a key, in seconds, and how much later a busy machine may notice.
const MAX_AGE: &str = "2";
const NOTICED: Duration = Duration::from_secs(2 + 4);

/// What a program finds that has a file open and mapped when its key is revoked, and when it is granted again.
fn revoked(revoke: impl Fn(&KmsVolume), grant: impl Fn(&KmsVolume), expected: i32) {
    const LEN: usize = 1 << 20;
    let scene = KmsVolume::new(&["--no-prefetch", "--key-max-age", MAX_AGE]);
    let files = scene.files("f", 3, LEN);
    scene.make_cold();
    let [used, mapped, unused] = &files[..] else { unreachable!() };
    let open = File::options().read(true).write(true).open(used).unwrap();
    let read = |place: usize| {
        let mut page = [0; 4096];
        open.read_exact_at(&mut page, place as u64).map(|()| page)
    };
    assert!(read(0).unwrap()[..] == content(0, LEN)[..4096]);
    let script = "import mmap,sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); print(m[0], flush=True)\n\
                  for line in sys.stdin: print(m[0], flush=True)";
    let mut program = Command::new("python3");
    program.args(["-c", script]).arg(mapped).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut program = program.spawn().unwrap();
    let (mut ask, mut answers) =
        (program.stdin.take().unwrap(), BufReader::new(program.stdout.take().unwrap()).lines());
    assert_eq!(answers.next().unwrap().unwrap(), content(1, LEN)[0].to_string());

    revoke(&scene);
    let since = Instant::now();
    assert_eq!(errno(File::open(unused)), Some(expected), "its key was never asked for");
    eventually("the page in the kernel's cache is dropped", || errno(read(0)) == Some(expected));
    let took = since.elapsed();
    println!("an open file stopped after {took:?}");
    assert!(took < NOTICED, "{took:?}");
    assert_eq!(errno(read(LEN / 2)), Some(expected), "a page that was never read");
    assert_eq!(errno(File::open(used)), Some(expected));
    let write = open.write_all_at(&[1; 4096], 0).and_then(|()| open.sync_all());
    assert!(write.is_err(), "what is written has no key");
    eventually("the mapping ends", || {
        let _ = ask.write_all(b"again\n");
        program.try_wait().unwrap().is_some()
    });
    assert_eq!(program.wait().unwrap().signal(), Some(libc::SIGBUS));

    grant(&scene);
    eventually("the open file works again", || read(LEN / 2).is_ok());
    assert!(read(LEN / 2).unwrap()[..] == content(0, LEN)[LEN / 2..][..4096]);
    for (n, file) in files.iter().enumerate().skip(1) {
        eventually("it opens again", || File::open(file).is_ok());
        assert!(fs::read(file).unwrap() == content(n, LEN));
    }
}

#[test]
fn a_disabled_key_stops_open_files_and_heals_without_a_remount() {
    revoked(|scene| scene.set_enabled(false), |scene| scene.set_enabled(true), libc::EKEYREVOKED);
}

#[test]
fn a_caller_who_may_no_longer_decrypt_is_stopped_and_heals_without_a_remount() {
    revoked(|scene| scene.server.deny(DECRYPT), |scene| scene.server.allow(DECRYPT), libc::EACCES);
}

/// Headers that somebody who can write to the cipher directory makes from one that he has seen.
#[test]
fn ten_thousand_junk_headers_cost_no_call() {
    const COUNT: usize = 10_000;
    const PAGE: usize = 4096;
    let scene = KmsVolume::with_init(&["--files-per-data-key", "20000"], &["--no-prefetch"]);
    let model = scene.files("model", 1, 100).remove(0);
    let files = scene.files("f", COUNT, 100);
    let mut header = vec![0; PAGE];
    File::open(scene.volume.behind("model0")).unwrap().read_exact_at(&mut header, 0).unwrap();
    scene.make_cold();
    let end = header.iter().rposition(|byte| *byte != 0).unwrap();
    let id = scene.volume.status()["volume_id"].as_str().unwrap().replace('-', "");
    let id: Vec<_> = (0..16).map(|n| u8::from_str_radix(&id[2 * n..2 * n + 2], 16).unwrap()).collect();
    let places = [id.as_slice(), scene.key.id.as_bytes()].map(|part| {
        header.windows(part.len()).position(|window| window == part).expect("the header names the volume and the key")
    });
    let mut made = 0;
    for path in
        walk(&scene.volume.cipher).iter().filter(|path| path.is_file() && !path.to_string_lossy().contains("/.kmsfs"))
    {
        let file = File::options().write(true).open(path).unwrap();
        let mut junk = header.clone();
        match made % 4 {
            0 => junk[made / 4 * 37 % (end + 1)] ^= 1 << (made / 4 % 8),
            1 => junk[places[0] + made / 4 % 16] ^= 0xff,
            2 => junk[places[1]..][..8].copy_from_slice(format!("{made:08x}").as_bytes()),
            _ => junk.copy_from_slice(&support::bytes(made as u64, PAGE)),
        }
        file.write_all_at(&junk, 0).unwrap();
        made += 1;
    }
    assert!(made > COUNT, "{made} files behind {COUNT}");
    let (calls, own) = (scene.server.all_calls(), scene.status("provider_calls"));
    let opened = open_all(&files, 8);
    for opened in &opened {
        let errno = opened.result.as_ref().err().and_then(std::io::Error::raw_os_error);
        assert_eq!(errno, Some(libc::EIO));
    }
    assert_eq!(errno(File::open(model)), Some(libc::EIO));
    assert_eq!((scene.server.all_calls() - calls, scene.status("provider_calls") - own), (0, 0));
    assert!(scene.volume.home.logs().contains("the file's header does not "), "{}", scene.volume.home.logs());
}
