#![allow(unsafe_code, clippy::all, missing_docs)]
use kmsfs::keys::{EncryptionContext, ProviderKind, providers};
use std::time::Instant;
fn main() {
    let key = std::env::args().nth(1).unwrap();
    let threads: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let calls: usize = std::env::args().nth(3).unwrap().parse().unwrap();
    let mut s = providers::ProviderSettings::default();
    s.aws.endpoint = std::env::var("KMSFS_ENDPOINT_URL").ok();
    let p = providers::open(ProviderKind::AwsKms, &key, None, &s).unwrap();
    let c = EncryptionContext::data_key(&[1; 16], &[2; 16]);
    let (_, w) = p.generate_data_key(&c).unwrap();
    let (b0, t0) = (cpu(), Instant::now());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..calls {
                    p.unwrap(&w.key_id, &w.bytes, &c).unwrap();
                }
            });
        }
    });
    let n = (threads * calls) as f64;
    let b = cpu();
    println!(
        "{:.1} us user + {:.1} us sys per call; wall {:.1} us/call",
        (b.0 - b0.0) / n,
        (b.1 - b0.1) / n,
        t0.elapsed().as_secs_f64() * 1e6 / n
    );
}
fn cpu() -> (f64, f64) {
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    (
        u.ru_utime.tv_sec as f64 * 1e6 + u.ru_utime.tv_usec as f64,
        u.ru_stime.tv_sec as f64 * 1e6 + u.ru_stime.tv_usec as f64,
    )
}
