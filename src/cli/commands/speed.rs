//! `kmsfs speed`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::report;
use crate::crypto::{AeadSession, Secret, Suite, SuiteKey, TAG_LEN, random_array};
use crate::format::geometry::{PAYLOAD_LEN, PageIndex};
use crate::format::page::{Trailer, associated_data, nonce};

/// How long each measurement takes.
const DURATION: Duration = Duration::from_millis(300);
/// Pages that share a random base, as in a write request of 1 MiB.
const PAGES_PER_REQUEST: u64 = 256;

/// Measure both cipher suites on this CPU, one thread, pages of 4 KiB
#[derive(Debug, Args)]
pub(crate) struct SpeedArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    suites: Vec<SuiteSpeed>,
    auto: &'static str,
}

#[derive(Serialize)]
struct SuiteSpeed {
    suite: &'static str,
    seal_mb_per_s: u64,
    open_mb_per_s: u64,
}

/// Measures.
pub(crate) fn run(args: &SpeedArgs) -> Result<(), CliError> {
    let suites = Suite::ALL.into_iter().map(measure).collect::<Result<_, _>>()?;
    report::print(&Report { suites, auto: Suite::fastest_here().name() }, args.json)
}

fn measure(suite: Suite) -> Result<SuiteSpeed, CliError> {
    let key = SuiteKey::new(suite, &Secret::random());
    let seal = pages_per_second(|count| {
        seal_request(&mut key.session(), count);
        Ok(())
    })?;
    let (base, boxes) = seal_request(&mut key.session(), PAGES_PER_REQUEST);
    let open = pages_per_second(|_| open_request(&mut key.session(), &base, &boxes))?;
    Ok(SuiteSpeed { suite: suite.name(), seal_mb_per_s: megabytes(seal), open_mb_per_s: megabytes(open) })
}

/// The pages that `request` handles in a second, called over and over with the number of pages of a request.
fn pages_per_second(mut request: impl FnMut(u64) -> Result<(), CliError>) -> Result<u64, CliError> {
    let start = Instant::now();
    let mut pages = 0;
    while start.elapsed() < DURATION {
        request(PAGES_PER_REQUEST)?;
        pages += PAGES_PER_REQUEST;
    }
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
    Ok(pages * 1_000_000 / micros)
}

fn megabytes(pages: u64) -> u64 {
    pages * PAYLOAD_LEN as u64 / 1_000_000
}

type SealedPage = ([u8; PAYLOAD_LEN], [u8; TAG_LEN]);

fn aad(index: u64) -> [u8; 16] {
    associated_data(PageIndex(index), Trailer::INNER.encode())
}

fn seal_request(session: &mut AeadSession<'_>, count: u64) -> ([u8; 24], Vec<SealedPage>) {
    let base = random_array();
    let plain = [0x5a; PAYLOAD_LEN];
    let mut boxes = vec![([0; PAYLOAD_LEN], [0; TAG_LEN]); usize::try_from(count).unwrap_or(0)];
    for (index, (cipher, tag)) in (0..).zip(&mut boxes) {
        *tag = session.seal(&nonce(&base, index), &aad(index), black_box(&plain), cipher);
    }
    (base, black_box(boxes))
}

fn open_request(session: &mut AeadSession<'_>, base: &[u8; 24], boxes: &[SealedPage]) -> Result<(), CliError> {
    let mut plain = [0; PAYLOAD_LEN];
    for (index, (cipher, tag)) in (0..).zip(boxes) {
        let opened = session.open(&nonce(base, index), &aad(index), cipher, tag, &mut plain);
        opened.map_err(|error| CliError::new(Exit::Unauthentic, error))?;
        black_box(&plain);
    }
    Ok(())
}
