//! What a mount counts, as OpenMetrics 1.0 text, each with its help.
//!
//! Labels have few values: operations, errnos, results; never a name or path of a file.

use std::fmt::{Display, Write as _};

use crate::meter::Latency;

use super::watched::Watched;

/// Every how many of its bounds a histogram is told: a factor of 4 from one to the next.
const STEP: usize = 2;

/// A family of metrics, as text.
struct Family<'t> {
    text: &'t mut String,
    name: &'static str,
    suffix: &'static str,
}

/// The text under construction.
struct Page(String);

impl Page {
    /// Writing to a string does not fail.
    fn family(&mut self, name: &'static str, kind: &str, unit: &str, help: &str) -> Family<'_> {
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(self.0, "# UNIT {name} {unit}");
        }
        let _ = writeln!(self.0, "# HELP {name} {help}");
        let suffix = if kind == "counter" { "_total" } else { "" };
        Family { text: &mut self.0, name, suffix }
    }

    fn counter(&mut self, name: &'static str, unit: &str, help: &str, value: u64) {
        self.family(name, "counter", unit, help).sample(&[], value);
    }

    fn gauge(&mut self, name: &'static str, unit: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", unit, help).sample(&[], value);
    }
}

impl Family<'_> {
    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let suffix = self.suffix;
        self.line(suffix, labels, value);
    }

    fn line(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<_> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.text, "{}{suffix}{labels} {value}", self.name);
    }

    fn histogram(&mut self, operation: &str, latency: &Latency) {
        let (mut sum, last) = (0, latency.buckets.len().saturating_sub(1));
        for (n, count) in latency.buckets.iter().enumerate() {
            sum += count;
            if n == last {
                self.line("_bucket", &[("operation", operation), ("le", "+Inf")], sum);
            } else if n % STEP == 0
                && let Some(bound) = Latency::bound(n)
            {
                let le = bound.as_secs_f64().to_string();
                self.line("_bucket", &[("operation", operation), ("le", &le)], sum);
            }
        }
        self.line("_count", &[("operation", operation)], sum);
        self.line("_sum", &[("operation", operation)], seconds(latency.nanos));
    }
}

/// A label's value as the format writes it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[allow(clippy::cast_precision_loss)] // it is for graphs
fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

/// The page that a scraper is given.
pub(crate) fn render(watched: &Watched) -> String {
    let mut page = Page(String::with_capacity(64 * 1024));
    put_mount(&mut page, watched);
    put_operations(&mut page, watched);
    put_keys(&mut page, watched);
    put_provider(&mut page, watched);
    put_audit(&mut page, watched);
    page.0.push_str("# EOF\n");
    page.0
}

fn put_mount(page: &mut Page, watched: &Watched) {
    let (status, measures) = (&watched.status, &watched.measures);
    let stats = &status.stats;
    let mut info = page.family("kmsfs", "info", "", "The mount.");
    info.line(
        "_info",
        &[
            ("version", env!("CARGO_PKG_VERSION")),
            ("volume_id", &stats.volume_id),
            ("suite", &stats.suite),
            ("mountpoint", &status.mountpoint),
        ],
        1,
    );
    page.gauge("kmsfs_uptime_seconds", "seconds", "How long the mount is there.", status.uptime_seconds);
    page.gauge("kmsfs_read_only", "", "1 if nothing can be changed.", u8::from(stats.read_only));
    page.gauge(
        "kmsfs_locked",
        "",
        "1 if all keys are withheld, by kmsfs lock or for want of use.",
        u8::from(stats.locked),
    );
    page.gauge("kmsfs_files_open", "", "Files with an open handle.", stats.files_open);
    page.gauge("kmsfs_inodes", "", "Inodes that the kernel knows.", stats.inodes_known);
    page.gauge("kmsfs_descriptors", "", "Descriptors in use.", measures.descriptors);
    page.gauge("kmsfs_descriptors_limit", "", "Descriptors that the process may have.", measures.descriptor_limit);
    page.gauge("kmsfs_unsettled_files", "", "Files that wait to be settled.", stats.unsettled_files);
    let counts = [
        ("kmsfs_unauthentic_pages", "Pages that did not authenticate.", stats.unauthentic_pages),
        ("kmsfs_missing_end_marks", "Files found without an end mark.", stats.missing_end_marks),
        ("kmsfs_undecryptable_names", "Entries left out since their name does not decrypt.", stats.undecryptable_names),
    ];
    for (name, help, value) in counts {
        page.counter(name, "", help, value);
    }
}

fn put_operations(page: &mut Page, watched: &Watched) {
    let measures = &watched.measures;
    page.counter("kmsfs_read_bytes", "bytes", "Plain bytes that the kernel was given.", measures.read_bytes);
    page.counter("kmsfs_written_bytes", "bytes", "Plain bytes that the kernel gave.", measures.written_bytes);
    let help = "Time from the kernel's request to the answer.";
    let mut family = page.family("kmsfs_operation_duration_seconds", "histogram", "seconds", help);
    for measure in &measures.operations {
        family.histogram(&measure.operation, &measure.latency);
    }
    let mut family = page.family("kmsfs_operation_errors", "counter", "", "Operations that failed, by errno.");
    for measure in &measures.operations {
        for (errno, count) in &measure.errors {
            family.sample(&[("operation", &measure.operation), ("errno", errno)], count);
        }
    }
    page.gauge(
        "kmsfs_operations_waiting",
        "",
        "Operations that wait for a key provider.",
        watched.status.stats.operations_waiting,
    );
}

fn put_keys(page: &mut Page, watched: &Watched) {
    let (stats, keys) = (&watched.status.stats, &watched.measures.keys);
    page.counter("kmsfs_key_cache_hits", "", "Openings whose data key was in memory.", stats.key_cache_hits);
    page.counter("kmsfs_key_cache_misses", "", "Openings that needed a provider.", stats.key_cache_misses);
    page.gauge("kmsfs_key_cache_entries", "", "Unwrapped data keys in memory.", stats.key_cache_entries);
    page.gauge("kmsfs_key_cache_limit", "", "Unwrapped data keys in memory at most.", keys.cache_limit);
    let protected = u8::from(stats.key_memory != "ordinary");
    page.gauge("kmsfs_key_memory_protected", "", "0 if keys may be swapped to disk.", protected);
    page.gauge("kmsfs_pool_keys_ready", "", "Data keys ready for new files.", keys.pool.ready);
    page.gauge("kmsfs_pool_keys_wanted", "", "Data keys to be kept ready.", keys.pool.wanted);
    page.gauge("kmsfs_pool_calls", "", "Data keys that are being made.", keys.pool.calls);
    page.gauge("kmsfs_pool_waiting", "", "Operations that wait for a new data key.", keys.pool.waiting);
    if let Some(left) = stats.provisioned_keys {
        page.gauge("kmsfs_provisioned_keys", "", "Provisioned keys in stock.", left);
    }
}

fn put_provider(page: &mut Page, watched: &Watched) {
    let keys = &watched.measures.keys;
    let help = "Calls of key providers by what came of them, every attempt counted; throttled is among the results.";
    let mut family = page.family("kmsfs_provider_calls", "counter", "", help);
    for call in &keys.calls {
        for (result, count) in &call.results {
            family.sample(&[("operation", &call.operation), ("result", result)], count);
        }
    }
    let help = "Time of calls of key providers, without the wait for their turn.";
    let mut family = page.family("kmsfs_provider_call_duration_seconds", "histogram", "seconds", help);
    for call in &keys.calls {
        family.histogram(&call.operation, &call.latency);
    }
    let rate = keys.calls_per_second.map_or("+Inf".to_owned(), |rate| rate.to_string());
    page.gauge("kmsfs_provider_rate_limit", "", "Calls a second that may be made now.", rate);
}

fn put_audit(page: &mut Page, watched: &Watched) {
    let Some(audit) = &watched.status.audit else { return };
    page.counter("kmsfs_audit_records", "", "Records of the audit log, over all mounts.", audit.records);
    page.counter("kmsfs_audit_lost", "", "Uses of keys that are in no record.", audit.lost);
    page.counter("kmsfs_audit_failures", "", "Attempts to write the audit log that failed.", audit.failures);
    page.gauge("kmsfs_audit_waiting", "", "Uses of keys that wait to be recorded.", audit.waiting);
    page.gauge("kmsfs_audit_failing", "", "1 if the audit log cannot be written.", u8::from(audit.failing.is_some()));
}
