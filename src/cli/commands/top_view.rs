//! What `kmsfs top` shows: the difference between two looks at a mount, as numbers and as lines of text.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use crate::audit::AuditStatus;
use crate::cli::report::printable;
use crate::cli::watched::Watched;
use crate::keys::PoolMeasure;
use crate::meter::Latency;

/// A mount during one interval. Rates are of the interval, totals since the mount.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Frame {
    pub(super) mountpoint: String,
    pub(super) volume_id: String,
    pub(super) uptime_seconds: u64,
    pub(super) interval_seconds: f64,
    pub(super) locked: bool,
    pub(super) read_bytes_per_second: f64,
    pub(super) written_bytes_per_second: f64,
    pub(super) operations_per_second: f64,
    pub(super) errors_per_second: f64,
    pub(super) files_open: u64,
    pub(super) inodes: u64,
    pub(super) descriptors: u64,
    pub(super) descriptors_limit: u64,
    pub(super) unsettled_files: u64,
    pub(super) operations_waiting: u64,
    pub(super) unauthentic_pages: u64,
    /// The busiest first.
    pub(super) operations: Vec<Row>,
    pub(super) errors: Vec<ErrorRow>,
    pub(super) cache: CacheRow,
    pub(super) pool: PoolMeasure,
    pub(super) provisioned_keys: Option<u64>,
    pub(super) provider: Vec<Row>,
    pub(super) throttled: u64,
    /// Nothing if there is none.
    pub(super) provider_rate_limit: Option<f64>,
    pub(super) audit: Option<AuditStatus>,
}

/// One operation. Latencies are of the interval, or nothing if there was none in it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) operation: String,
    pub(super) per_second: f64,
    pub(super) total: u64,
    pub(super) mean_micros: Option<f64>,
    pub(super) p50_micros: Option<f64>,
    pub(super) p99_micros: Option<f64>,
    pub(super) failed: u64,
}

/// Failed operations of one kind since the mount.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ErrorRow {
    pub(super) errno: String,
    pub(super) total: u64,
}

/// The key cache.
#[derive(Clone, Debug, Serialize)]
pub(super) struct CacheRow {
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) hits_per_second: f64,
    pub(super) misses_per_second: f64,
    pub(super) entries: u64,
    pub(super) limit: u64,
    pub(super) memory: String,
}

#[allow(clippy::cast_precision_loss)] // rates are for people
fn rate(now: u64, before: u64, elapsed: Duration) -> f64 {
    now.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(1e-3)
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

impl Row {
    fn new(operation: &str, now: &Latency, before: Option<&Latency>, failed: u64, elapsed: Duration) -> Self {
        let empty = Latency::default();
        let recent = now.since(before.unwrap_or(&empty));
        let some = |value: f64| (recent.count() > 0).then_some(value);
        Self {
            operation: operation.to_owned(),
            per_second: rate(recent.count(), 0, elapsed),
            total: now.count(),
            mean_micros: some(micros(recent.mean())),
            p50_micros: some(micros(recent.quantile(0.5))),
            p99_micros: some(micros(recent.quantile(0.99))),
            failed,
        }
    }
}

impl Frame {
    /// What happened between two looks.
    pub(super) fn between(before: &Watched, now: &Watched, elapsed: Duration) -> Self {
        let (stats, earlier) = (&now.status.stats, &before.status.stats);
        let (measures, then) = (&now.measures, &before.measures);
        let operations = operation_rows(before, now, elapsed);
        let failures = |watched: &Watched| -> u64 {
            watched.measures.operations.iter().flat_map(|measure| &measure.errors).map(|(_, count)| count).sum()
        };
        Self {
            mountpoint: now.status.mountpoint.clone(),
            volume_id: stats.volume_id.clone(),
            uptime_seconds: now.status.uptime_seconds,
            interval_seconds: elapsed.as_secs_f64(),
            locked: stats.locked,
            read_bytes_per_second: rate(measures.read_bytes, then.read_bytes, elapsed),
            written_bytes_per_second: rate(measures.written_bytes, then.written_bytes, elapsed),
            operations_per_second: operations.iter().map(|row| row.per_second).sum(),
            errors_per_second: rate(failures(now), failures(before), elapsed),
            files_open: stats.files_open,
            inodes: stats.inodes_known,
            descriptors: measures.descriptors,
            descriptors_limit: measures.descriptor_limit,
            unsettled_files: stats.unsettled_files,
            operations_waiting: stats.operations_waiting,
            unauthentic_pages: stats.unauthentic_pages,
            operations,
            errors: error_rows(now),
            cache: CacheRow {
                hits: stats.key_cache_hits,
                misses: stats.key_cache_misses,
                hits_per_second: rate(stats.key_cache_hits, earlier.key_cache_hits, elapsed),
                misses_per_second: rate(stats.key_cache_misses, earlier.key_cache_misses, elapsed),
                entries: stats.key_cache_entries,
                limit: measures.keys.cache_limit,
                memory: stats.key_memory.clone(),
            },
            pool: measures.keys.pool,
            provisioned_keys: stats.provisioned_keys,
            provider: provider_rows(before, now, elapsed),
            throttled: measures.keys.calls.iter().map(|call| result(&call.results, |name| name == "throttled")).sum(),
            provider_rate_limit: measures.keys.calls_per_second,
            audit: now.status.audit.clone(),
        }
    }
}

/// How many of a kind of result.
fn result(results: &[(String, u64)], wanted: impl Fn(&str) -> bool) -> u64 {
    results.iter().filter(|(name, _)| wanted(name)).map(|(_, count)| count).sum()
}

fn operation_rows(before: &Watched, now: &Watched, elapsed: Duration) -> Vec<Row> {
    let earlier = &before.measures.operations;
    let rows = now.measures.operations.iter().filter(|measure| measure.latency.count() > 0).map(|measure| {
        let then = earlier.iter().find(|then| then.operation == measure.operation).map(|then| &then.latency);
        let failed = measure.errors.iter().map(|(_, count)| count).sum();
        Row::new(&measure.operation, &measure.latency, then, failed, elapsed)
    });
    busiest(rows.collect())
}

fn provider_rows(before: &Watched, now: &Watched, elapsed: Duration) -> Vec<Row> {
    let earlier = &before.measures.keys.calls;
    let rows = now.measures.keys.calls.iter().filter(|call| call.latency.count() > 0).map(|call| {
        let then = earlier.iter().find(|then| then.operation == call.operation).map(|then| &then.latency);
        Row::new(&call.operation, &call.latency, then, result(&call.results, |name| name != "ok"), elapsed)
    });
    busiest(rows.collect())
}

fn busiest(mut rows: Vec<Row>) -> Vec<Row> {
    rows.sort_by(|a, b| b.per_second.total_cmp(&a.per_second).then(b.total.cmp(&a.total)));
    rows
}

fn error_rows(now: &Watched) -> Vec<ErrorRow> {
    let mut rows: Vec<ErrorRow> = Vec::new();
    for (errno, count) in now.measures.operations.iter().flat_map(|measure| &measure.errors) {
        match rows.iter_mut().find(|row| row.errno == *errno) {
            Some(row) => row.total += count,
            None => rows.push(ErrorRow { errno: errno.clone(), total: *count }),
        }
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.total));
    rows
}

/// The frame as lines of at most `width` characters, at most `height` of them: operations give way first.
pub(super) fn lines(frame: &Frame, width: usize, height: usize) -> Vec<String> {
    let head = head(frame);
    let tail = tail(frame);
    let room = height.saturating_sub(head.len() + tail.len() + 2).max(1);
    let mut lines = head;
    lines.push(row_title("OPERATION"));
    lines.extend(frame.operations.iter().take(room).map(row_line));
    lines.push(String::new());
    lines.extend(tail);
    lines.truncate(height);
    lines.iter().map(|line| printable(line).chars().take(width).collect::<String>().trim_end().to_owned()).collect()
}

fn head(frame: &Frame) -> Vec<String> {
    let locked = if frame.locked { "LOCKED" } else { "unlocked" };
    let mut errors = format!("{:.1}/s", frame.errors_per_second);
    for row in frame.errors.iter().take(4) {
        // Writing to a string does not fail.
        let _ = write!(errors, "  {} {}", row.errno, row.total);
    }
    let mut state = format!(
        "files open {}  inodes {}  descriptors {}/{}  unsettled {}  waiting {}",
        frame.files_open,
        frame.inodes,
        frame.descriptors,
        frame.descriptors_limit,
        frame.unsettled_files,
        frame.operations_waiting
    );
    if frame.unauthentic_pages > 0 {
        let _ = write!(state, "  UNAUTHENTIC PAGES {}", frame.unauthentic_pages);
    }
    vec![
        format!("kmsfs {}  up {}  {locked}", frame.mountpoint, age(frame.uptime_seconds)),
        format!(
            "read {}/s  write {}/s  operations {:.1}/s",
            bytes(frame.read_bytes_per_second),
            bytes(frame.written_bytes_per_second),
            frame.operations_per_second
        ),
        state,
        format!("errors {errors}"),
        String::new(),
    ]
}

fn tail(frame: &Frame) -> Vec<String> {
    let cache = &frame.cache;
    let mut lines = vec![
        format!(
            "KEY CACHE  hits {} ({:.1}/s)  misses {} ({:.1}/s)  keys {}/{}  memory {}",
            cache.hits,
            cache.hits_per_second,
            cache.misses,
            cache.misses_per_second,
            cache.entries,
            cache.limit,
            cache.memory
        ),
        format!(
            "KEY POOL   ready {}/{}  being made {}  waiting {}  provisioned {}",
            frame.pool.ready,
            frame.pool.wanted,
            frame.pool.calls,
            frame.pool.waiting,
            frame.provisioned_keys.map_or("none".to_owned(), |left| left.to_string())
        ),
    ];
    if let Some(audit) = &frame.audit {
        let failing = audit.failing.as_ref().map_or("ok".to_owned(), |why| format!("FAILING: {why}"));
        let AuditStatus { records, waiting, lost, .. } = audit;
        lines.push(format!("AUDIT LOG  records {records}  waiting {waiting}  lost {lost}  {failing}"));
    }
    let limit = frame.provider_rate_limit.map_or("none".to_owned(), |rate| format!("{rate:.1}/s"));
    lines.push(row_title("PROVIDER CALL"));
    lines.extend(frame.provider.iter().take(4).map(row_line));
    lines.push(format!("throttled {}  rate limit {limit}", frame.throttled));
    lines
}

fn row_title(what: &str) -> String {
    let titles = ["per s", "total", "mean", "p50", "p99", "failed"];
    let [rate, total, mean, p50, p99, failed] = titles;
    format!("{what:<16}{rate:>10}{total:>12}{mean:>9}{p50:>9}{p99:>9}{failed:>10}")
}

fn row_line(row: &Row) -> String {
    let [mean, p50, p99] = [row.mean_micros, row.p50_micros, row.p99_micros].map(span);
    // GenerateDataKeyWithoutPlaintext is longer than its column.
    let name: String = row.operation.chars().take(15).collect();
    format!("{name:<16}{:>10.1}{:>12}{mean:>9}{p50:>9}{p99:>9}{:>10}", row.per_second, row.total, row.failed)
}

fn span(micros: Option<f64>) -> String {
    match micros {
        None => "-".to_owned(),
        Some(n) if n < 1000.0 => format!("{n:.0}us"),
        Some(n) if n < 1e6 => format!("{:.1}ms", n / 1e3),
        Some(n) => format!("{:.1}s", n / 1e6),
    }
}

fn bytes(n: f64) -> String {
    let (mut n, mut unit) = (n, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if n >= 1024.0 {
            (n, unit) = (n / 1024.0, next);
        }
    }
    format!("{n:.1} {unit}")
}

fn age(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match seconds {
        ..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 1023.0, 1536.0, 3e12].map(bytes), ["0.0 B", "1023.0 B", "1.5 KiB", "2.7 TiB"]);
        assert_eq!([None, Some(7.0), Some(1500.0), Some(2.5e6)].map(span), ["-", "7us", "1.5ms", "2.5s"]);
        assert_eq!([5, 65, 3725, 90_000].map(age), ["5s", "1m05s", "1h02m", "1d01h"]);
    }

    #[test]
    fn rows_are_no_wider_than_a_terminal() {
        let row = Row {
            operation: "GenerateDataKeyWithoutPlaintext".to_owned(),
            per_second: 123_456.7,
            total: 12_345_678_901,
            mean_micros: Some(1.0),
            p50_micros: Some(999_999.0),
            p99_micros: None,
            failed: 1_234_567,
        };
        assert!(row_line(&row).len() <= 80 && row_title("PROVIDER CALL").len() <= 80);
    }
}
